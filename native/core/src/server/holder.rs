//! The holder: a tiny process that mounts /dev/fuse and keeps its descriptor, so that a server of
//! the mount can be killed, upgraded or restarted while file systems above go on (they wait).
//!
//! One connection at a time is the server's. It ends with the server's process, and not before the
//! last thread of that process has ended (descriptors are closed then): so a successor never serves
//! beside a dying predecessor. If the holder dies, the server keeps the descriptor and gives it to
//! the next holder. A keeper (the agent) has a duplicate too, which it never reads, and gives it to
//! a holder that was started after both had died: only if all three are gone is the mount dead.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
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

/// A successor may come before the thread of its predecessor's connection has seen the end of that.
const PREDECESSOR_TIMEOUT: Duration = Duration::from_secs(2);
/// A holder that does not answer for so long hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

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
    /// The server's connection has ended.
    left: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// None: a server or keeper that outlived the last holder has it and will give it back.
    descriptor: Option<OwnedFd>,
    /// The descriptor came from a keeper: the server, if it lives, has yet to say so.
    kept: bool,
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
            left: Condvar::new(),
        })
    }

    fn status(&self) -> HolderStatus {
        self.status_in(&self.state.lock())
    }

    fn status_in(&self, state: &State) -> HolderStatus {
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
        let mut state = self.state.lock();
        let deadline = Instant::now() + PREDECESSOR_TIMEOUT;
        while state.server.is_some_and(|server| server != connection) {
            if self.left.wait_until(&mut state, deadline).timed_out() {
                return Err(self.served_by_another());
            }
        }
        // The status before this taking: whether someone had the descriptor earlier.
        let reply = self.duplicate(&state)?;
        state.server = Some(connection);
        state.handed_out = true;
        Ok(reply)
    }

    fn served_by_another(&self) -> Failure {
        Failure::state(
            "in-use",
            format!("{} is served by another process", self.mountpoint.display()),
            "stop that server first",
        )
    }

    /// The status, and a duplicate of the descriptor beside it.
    fn duplicate(&self, state: &State) -> Result<Reply, Failure> {
        let Some(descriptor) = &state.descriptor else {
            return Err(Failure::state(
                "not-held",
                "the server that outlived the last holder has not given the descriptor back",
                "send that server AttachFuse with this holder's socket",
            ));
        };
        let copy = descriptor.try_clone();
        let copy = copy.map_err(|error| Failure::io("duplicate the descriptor", &error))?;
        let mut reply = Reply::new(Outcome::HolderStatus(self.status_in(state)));
        reply.descriptor = Some(copy);
        Ok(reply)
    }

    fn take_back(&self, call: Call) -> Result<Reply, Failure> {
        let Some(descriptor) = call.descriptor else {
            return Err(Failure::usage("VERB_GIVE came without a descriptor"));
        };
        let mut state = self.state.lock();
        if state.descriptor.is_some() && !state.kept {
            return Err(Failure::state(
                "in-use",
                "this holder has a mount of its own",
                "the descriptor belongs to a mount that is gone; start the server anew",
            ));
        }
        if state.server.is_some_and(|server| server != call.connection) {
            return Err(self.served_by_another());
        }
        *state = State {
            descriptor: Some(descriptor),
            kept: false,
            initialized: true,
            handed_out: true,
            server: Some(call.connection),
        };
        drop(state);
        Ok(self.reply())
    }

    /// A keeper offers its duplicate. Who has the descriptor needs no other: its own mount's, or
    /// what a server gave back.
    fn keep(&self, call: Call) -> Result<Reply, Failure> {
        let Some(descriptor) = call.descriptor else {
            return Err(Failure::usage("VERB_KEEP came without a descriptor"));
        };
        let mut state = self.state.lock();
        if state.descriptor.is_none() {
            state.descriptor = Some(descriptor);
            state.kept = true;
            // A server may have read requests: the next has them sent again.
            state.handed_out = true;
        }
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
                HolderVerb::Copy => self.duplicate(&self.state.lock()),
                HolderVerb::Keep => self.keep(call),
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
            self.left.notify_all();
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
        stream
            .set_read_timeout(Some(ANSWER_TIMEOUT))
            .map_err(|error| Failure::io("talk to the holder", &error))?;
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

    /// A duplicate for a keeper, which must neither read nor write it.
    pub fn copy(socket: &Path) -> Result<OwnedFd, Failure> {
        let (_, descriptor) = Self::connect(socket)?.call(HolderVerb::Copy, None)?;
        descriptor.ok_or_else(|| Failure::usage("the holder sent no descriptor"))
    }

    /// Offers a keeper's duplicate to a holder, which takes it if it has none.
    pub fn keep(socket: &Path, descriptor: &OwnedFd) -> Result<HolderStatus, Failure> {
        let (status, _) = Self::connect(socket)?.call(HolderVerb::Keep, Some(descriptor))?;
        Ok(status)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A holder of something that stands for a mount's descriptor, or of none.
    fn holder(descriptor: Option<OwnedFd>) -> Holder {
        Holder {
            mountpoint: "/mountpoint".into(),
            exit: Exit::new().unwrap(),
            state: Mutex::new(State {
                descriptor,
                ..State::default()
            }),
            left: Condvar::new(),
        }
    }

    fn descriptor() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    fn ask(
        holder: &Holder,
        connection: u64,
        verb: HolderVerb,
        descriptor: Option<OwnedFd>,
    ) -> Result<(HolderStatus, bool), &'static str> {
        let verb = Verb::Holder(HolderRequest { verb: verb.into() });
        let call = Call {
            verb,
            connection,
            descriptor,
        };
        let reply = holder.handle(call).map_err(|failure| failure.code)?;
        let Outcome::HolderStatus(status) = reply.outcome else {
            panic!("{reply:?}");
        };
        Ok((status, reply.descriptor.is_some()))
    }

    #[test]
    fn a_successor_is_not_refused_because_its_predecessors_end_was_not_seen_yet() {
        let holder = holder(Some(descriptor()));
        ask(&holder, 1, HolderVerb::Take, None).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                holder.closed(1);
            });
            let (status, handed) = ask(&holder, 2, HolderVerb::Take, None).unwrap();
            assert!(status.handed_out && handed);
        });
        // One that lives is not robbed.
        assert_eq!(
            ask(&holder, 3, HolderVerb::Take, None).unwrap_err(),
            "in-use"
        );
    }

    #[test]
    fn a_keepers_duplicate_serves_when_server_and_holder_are_gone() {
        let holder = holder(None);
        for verb in [HolderVerb::Take, HolderVerb::Copy] {
            assert_eq!(ask(&holder, 1, verb, None).unwrap_err(), "not-held");
        }
        let (status, _) = ask(&holder, 2, HolderVerb::Keep, Some(descriptor())).unwrap();
        assert!(status.holding && !status.served);
        let (_, handed) = ask(&holder, 3, HolderVerb::Copy, None).unwrap();
        assert!(handed);
        // The next server has the requests of the dead one sent again.
        let (status, handed) = ask(&holder, 4, HolderVerb::Take, None).unwrap();
        assert!(status.handed_out && handed);
    }

    #[test]
    fn a_server_that_lives_gives_back_what_the_keeper_already_gave() {
        let holder = holder(None);
        ask(&holder, 1, HolderVerb::Keep, Some(descriptor())).unwrap();
        let (status, _) = ask(&holder, 2, HolderVerb::Give, Some(descriptor())).unwrap();
        assert!(status.holding && status.served);
        assert_eq!(
            ask(&holder, 3, HolderVerb::Take, None).unwrap_err(),
            "in-use"
        );
    }

    #[test]
    fn a_mount_of_its_own_is_not_replaced_by_one_that_is_gone() {
        let holder = holder(Some(descriptor()));
        let (status, _) = ask(&holder, 1, HolderVerb::Keep, Some(descriptor())).unwrap();
        assert!(!status.handed_out);
        let refused = ask(&holder, 2, HolderVerb::Give, Some(descriptor()));
        assert_eq!(refused.unwrap_err(), "in-use");
    }
}
