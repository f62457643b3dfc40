//! The holder: a tiny process that mounts /dev/fuse and keeps its descriptor, so that a server of
//! the mount can be killed, upgraded or restarted while file systems above go on (they wait).
//!
//! One connection at a time is the server's. It ends with the server's process, and not before the
//! last thread of that process has ended (descriptors are closed then): so a successor never serves
//! beside a dying predecessor. If the holder dies, the server keeps the descriptor and gives it to
//! the next holder; only if both are gone at once is the mount dead.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use prost::Message;

use super::control::{Call, ControlServer, Handler, Reply, listen};
use super::failure::Failure;
use super::proto::holder_request::Verb as HolderVerb;
use super::proto::request::Verb;
use super::proto::response::Result as Outcome;
use super::proto::{HolderLaunch, HolderRequest, HolderStatus, Request, Response};
use super::run::{Exit, Signals, finish, report_ready};
use super::{memory, wire};
use crate::fuse::mount::{self, Found};

/// Runs a holder until it is told to stop. `launch` is an encoded `HolderLaunch`.
pub fn holder_main(launch: &[u8]) -> i32 {
    finish(run(launch))
}

fn run(launch: &[u8]) -> Result<(), Failure> {
    let launch = HolderLaunch::decode(launch)
        .map_err(|error| Failure::usage(format!("the launch message is damaged: {error}")))?;
    let signals = Signals::block()?;
    // What cannot be locked or exempted matters little here: the holder is not in the data path.
    memory::enter_write_back_path();
    let exit = Exit::new()?;
    // The socket first: it keeps a second holder from touching the mount.
    let socket = PathBuf::from(&launch.control_socket);
    let listener = listen(&socket)?;
    let holder = Arc::new(Holder::open(
        Path::new(&launch.mountpoint),
        &launch.source,
        &exit,
    )?);
    let control = ControlServer::start(listener, &socket, Arc::clone(&holder) as _)
        .map_err(|error| Failure::io("serve the control socket", &error))?;
    report_ready(Outcome::HolderStatus(holder.status()));
    signals.wait(&exit);
    control.stop();
    Ok(())
}

/// What the holder knows. Nothing of it outlives the process: a new holder asks the mount table and
/// the server.
#[derive(Debug)]
struct Holder {
    mountpoint: PathBuf,
    exit: Exit,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// None: a server that outlived the last holder has it and will give it back.
    descriptor: Option<OwnedFd>,
    initialized: bool,
    handed_out: bool,
    /// Connection of the server that has the descriptor now.
    server: Option<u64>,
}

impl Holder {
    fn open(mountpoint: &Path, source: &str, exit: &Exit) -> Result<Self, Failure> {
        let failed = |action: &str| {
            let action = format!("{action} {}", mountpoint.display());
            move |error: std::io::Error| Failure::io(&action, &error)
        };
        let mut state = State::default();
        let found = mount::probe(mountpoint).map_err(failed("look at"))?;
        match found {
            Found::Alive => {
                // A server has the descriptor, hence had INIT or at least may have read it.
                state.initialized = true;
                state.handed_out = true;
            }
            Found::Foreign => {
                return Err(Failure::state(
                    "in-use",
                    format!(
                        "{}: another file system is mounted here",
                        mountpoint.display()
                    ),
                    "unmount it, or set another run directory",
                ));
            }
            Found::Dead | Found::Nothing => {
                if found == Found::Dead {
                    mount::detach(mountpoint).map_err(failed("detach the dead mount at"))?;
                }
                std::fs::create_dir_all(mountpoint).map_err(failed("make"))?;
                let descriptor =
                    mount::mount(mountpoint, source).map_err(failed("mount FUSE on"))?;
                state.descriptor = Some(descriptor);
            }
        }
        let mountpoint = mountpoint.to_owned();
        Ok(Self {
            mountpoint,
            exit: exit.clone(),
            state: Mutex::new(state),
        })
    }

    fn status(&self) -> HolderStatus {
        let state = self.state.lock();
        HolderStatus {
            initialized: state.initialized,
            mountpoint: self.mountpoint.to_string_lossy().into_owned(),
            handed_out: state.handed_out,
            served: state.server.is_some(),
            holding: state.descriptor.is_some(),
            pid: std::process::id(),
        }
    }

    fn reply(&self) -> Reply {
        Reply::new(Outcome::HolderStatus(self.status()))
    }

    fn take(&self, connection: u64) -> Result<Reply, Failure> {
        // The status before this taking: whether someone had the descriptor earlier.
        let mut reply = self.reply();
        let mut state = self.state.lock();
        if state.server.is_some_and(|server| server != connection) {
            return Err(Failure::state(
                "in-use",
                format!("{} is served by another process", self.mountpoint.display()),
                "stop that server first",
            ));
        }
        let Some(descriptor) = &state.descriptor else {
            return Err(Failure::state(
                "not-held",
                "the server that outlived the last holder has not given the descriptor back",
                "send that server AttachFuse with this holder's socket",
            ));
        };
        let copy = descriptor.try_clone();
        reply.descriptor =
            Some(copy.map_err(|error| Failure::io("duplicate the descriptor", &error))?);
        state.server = Some(connection);
        state.handed_out = true;
        Ok(reply)
    }

    fn take_back(&self, call: Call) -> Result<Reply, Failure> {
        let Some(descriptor) = call.descriptor else {
            return Err(Failure::usage("VERB_GIVE came without a descriptor"));
        };
        let mut state = self.state.lock();
        if state.descriptor.is_some() {
            return Err(Failure::state(
                "in-use",
                "this holder has a mount of its own",
                "the descriptor belongs to a mount that is gone; start the server anew",
            ));
        }
        *state = State {
            descriptor: Some(descriptor),
            initialized: true,
            handed_out: true,
            server: Some(call.connection),
        };
        drop(state);
        Ok(self.reply())
    }

    fn stop(&self, unmount: bool) -> Result<Reply, Failure> {
        if unmount {
            mount::unmount(&self.mountpoint).map_err(|error| {
                Failure::io(&format!("unmount {}", self.mountpoint.display()), &error)
            })?;
        }
        let exit = self.exit.clone();
        let mut reply = Reply::done();
        reply.then = Some(Box::new(move || exit.request()));
        Ok(reply)
    }
}

impl Handler for Holder {
    fn handle(&self, call: Call) -> Result<Reply, Failure> {
        match &call.verb {
            Verb::Status(_) => Ok(self.reply()),
            Verb::Stop(request) => self.stop(request.unmount),
            Verb::Holder(request) => match request.verb() {
                HolderVerb::Take => self.take(call.connection),
                HolderVerb::Give => self.take_back(call),
                HolderVerb::Initialized => {
                    let mut state = self.state.lock();
                    if state.server != Some(call.connection) {
                        return Err(Failure::usage("this connection does not serve the mount"));
                    }
                    state.initialized = true;
                    drop(state);
                    Ok(self.reply())
                }
                HolderVerb::Unspecified => Err(Failure::usage("the holder verb is unknown")),
            },
            _ => Err(Failure::usage("a holder does not know this verb")),
        }
    }

    fn closed(&self, connection: u64) {
        let mut state = self.state.lock();
        if state.server == Some(connection) {
            state.server = None;
        }
    }
}

/// A server's connection to its holder. As long as it is open the mount is this process's to serve;
/// it is closed when dropped, which must come after the last answer.
#[derive(Debug)]
pub struct HolderLink {
    stream: UnixStream,
    next_id: u64,
    pub mountpoint: String,
}

impl HolderLink {
    fn connect(socket: &Path) -> Result<Self, Failure> {
        let stream = UnixStream::connect(socket).map_err(|error| {
            Failure::io(
                &format!("connect to the holder at {}", socket.display()),
                &error,
            )
        })?;
        Ok(Self {
            stream,
            next_id: 1,
            mountpoint: String::new(),
        })
    }

    fn call(
        &mut self,
        verb: HolderVerb,
        descriptor: Option<&OwnedFd>,
    ) -> Result<(HolderStatus, Option<OwnedFd>), Failure> {
        let failed = |error: std::io::Error| Failure::io("talk to the holder", &error);
        let id = self.next_id;
        self.next_id += 1;
        let verb = Some(Verb::Holder(HolderRequest { verb: verb.into() }));
        let request = Request { id, verb };
        wire::send(&self.stream, &request, descriptor.map(AsFd::as_fd)).map_err(failed)?;
        let received = wire::receive::<Response>(&self.stream).map_err(failed)?;
        let (response, descriptor) =
            received.ok_or_else(|| failed(std::io::ErrorKind::UnexpectedEof.into()))?;
        match response.result {
            Some(Outcome::HolderStatus(status)) => {
                self.mountpoint.clone_from(&status.mountpoint);
                Ok((status, descriptor))
            }
            Some(Outcome::Failure(failure)) => Err(Failure::state(
                "holder",
                format!("the holder refuses: {}", failure.message),
                "is another server serving this mount?",
            )),
            _ => Err(Failure::usage("the holder gave an answer of another kind")),
        }
    }

    /// Takes the descriptor. The status tells whether somebody had it before.
    pub fn take(socket: &Path) -> Result<(Self, HolderStatus, OwnedFd), Failure> {
        let mut link = Self::connect(socket)?;
        let (status, descriptor) = link.call(HolderVerb::Take, None)?;
        let descriptor =
            descriptor.ok_or_else(|| Failure::usage("the holder sent no descriptor"))?;
        Ok((link, status, descriptor))
    }

    /// Gives the descriptor to a new holder and serves on.
    pub fn give(socket: &Path, descriptor: &OwnedFd) -> Result<(Self, HolderStatus), Failure> {
        let mut link = Self::connect(socket)?;
        let (status, _) = link.call(HolderVerb::Give, Some(descriptor))?;
        Ok((link, status))
    }

    /// Tells the holder that INIT was answered.
    pub fn initialized(&mut self) -> Result<HolderStatus, Failure> {
        Ok(self.call(HolderVerb::Initialized, None)?.0)
    }

    /// Whether the holder still lives.
    pub fn is_alive(&self) -> bool {
        use rustix::net::RecvFlags;
        let mut byte = [0u8];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        // The holder sends nothing unasked: readable means ended.
        rustix::net::recv(&self.stream, &mut byte, flags)
            .is_err_and(|error| error == rustix::io::Errno::AGAIN)
    }
}
