//! Serves plain files through the FUSE front end and a holder; what the integration tests kill.
//!
//! `fuse_file holder SOCKET DIRECTORY` mounts and holds. `fuse_file serve CONTROL FILE...` serves
//! the files (under their own names) once it is sent AttachFuse. `fuse_file request SOCKET VERB`
//! sends `status`, `stop`, `unmount` or `attach=HOLDER` and prints the answer. `fuse_file tap
//! CONTROL BACKING DIRECTORY` is a whole tap server instead, with spool and state under DIRECTORY
//! and a fixed key. `fuse_file loop-attach FILE`, `loop-detach DEVICE` and `loop-list` are the
//! functions of those names. `fuse_file record CONTROL TRACE FILE` is `serve` for one file that
//! also writes a block trace; `bench/traces.py` says what is in it.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use ebbtide_core::device::{Allocation, BlockDevice, DeviceError, DeviceInfo, RequestFlags};
use ebbtide_core::server::control::{Call, ControlServer, Handler, Reply, listen};
use ebbtide_core::server::proto::request::Verb;
use ebbtide_core::server::proto::response::Result as Outcome;
use ebbtide_core::server::proto::{
    AttachFuseRequest, HolderLaunch, Request, Response, StatusRequest, StopRequest, TapLaunch,
    TapStatus, TapVolume,
};
use ebbtide_core::server::run::{Exit, Signals, report_ready};
use ebbtide_core::server::{self, Failure, FuseFront, memory, wire};
use prost::Message;

/// A file as a device, with the page cache behind it, as a tap has its backing.
#[derive(Debug)]
struct FileDevice {
    file: File,
    size: u64,
    trace: Option<Trace>,
}

/// Kinds of a trace's entries.
const TRACE_WRITE: u8 = 1;
const TRACE_ZERO: u8 = 2;
const TRACE_DISCARD: u8 = 3;
const TRACE_FLUSH: u8 = 4;

/// What changed the device, in the order in which it did.
#[derive(Debug)]
struct Trace(Mutex<BufWriter<File>>);

impl Trace {
    fn create(path: &str) -> std::io::Result<Self> {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        file.write_all(b"EBBTRACE\x01\0\0\0\0\0\0\0")?;
        Ok(Self(Mutex::new(file)))
    }

    /// Appends one entry and runs `change` before another entry can follow it.
    fn record(
        &self,
        kind: u8,
        fua: bool,
        (offset, length): (u64, u64),
        content: &[u8],
        change: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut file = self.0.lock().expect("invariant: no holder panics");
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.expect("invariant: the clock is past 1970").as_micros();
        let time = u64::try_from(now).expect("invariant: microseconds fit for ages");
        let mut entry = [0; 32];
        entry[..8].copy_from_slice(&time.to_le_bytes());
        entry[8..16].copy_from_slice(&offset.to_le_bytes());
        entry[16..24].copy_from_slice(&length.to_le_bytes());
        entry[24] = kind;
        entry[25] = u8::from(fua);
        file.write_all(&entry)
            .and_then(|()| file.write_all(content))
            .and_then(|()| {
                if kind == TRACE_FLUSH {
                    file.flush()
                } else {
                    Ok(())
                }
            })
            .map_err(|error| device_error(&error))?;
        change()
    }
}

fn device_error(error: &std::io::Error) -> DeviceError {
    DeviceError::Io(error.raw_os_error().unwrap_or(5))
}

impl FileDevice {
    /// Runs `change`, and writes it into the trace if there is one.
    fn traced(
        &self,
        kind: u8,
        fua: bool,
        range: (u64, u64),
        content: &[u8],
        change: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        match &self.trace {
            Some(trace) => trace.record(kind, fua, range, content, change),
            None => change(),
        }
    }

    fn fallocate(&self, offset: u64, length: u64, zero: bool) -> Result<(), DeviceError> {
        use rustix::fs::{FallocateFlags, fallocate};
        let kind = if zero {
            FallocateFlags::ZERO_RANGE
        } else {
            FallocateFlags::PUNCH_HOLE
        };
        fallocate(&self.file, kind | FallocateFlags::KEEP_SIZE, offset, length)
            .map_err(|error| device_error(&error.into()))
    }

    fn sync(&self) -> Result<(), DeviceError> {
        self.file.sync_data().map_err(|error| device_error(&error))
    }
}

impl BlockDevice for FileDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            size: self.size,
            read_only: false,
            multi_conn: true,
        }
    }

    fn read(&self, buffer: &mut [u8], offset: u64, _: RequestFlags) -> Result<(), DeviceError> {
        self.file
            .read_exact_at(buffer, offset)
            .map_err(|error| device_error(&error))
    }

    fn write(&self, data: &[u8], offset: u64, flags: RequestFlags) -> Result<(), DeviceError> {
        let range = (offset, data.len() as u64);
        self.traced(TRACE_WRITE, flags.fua, range, data, || {
            self.file
                .write_all_at(data, offset)
                .map_err(|error| device_error(&error))
        })?;
        if flags.fua { self.sync() } else { Ok(()) }
    }

    fn flush(&self, _: RequestFlags) -> Result<(), DeviceError> {
        // The entry comes first: a FLUSH covers what was answered before it was asked for.
        self.traced(TRACE_FLUSH, false, (0, 0), &[], || Ok(()))?;
        self.sync()
    }

    fn trim(&self, offset: u64, length: u64, _: RequestFlags) -> Result<(), DeviceError> {
        self.traced(TRACE_DISCARD, false, (offset, length), &[], || {
            self.fallocate(offset, length, false)
        })
    }

    fn zero(&self, offset: u64, length: u64, _: RequestFlags) -> Result<(), DeviceError> {
        self.traced(TRACE_ZERO, false, (offset, length), &[], || {
            self.fallocate(offset, length, true)
        })
    }

    fn allocation(
        &self,
        _: u64,
        length: u64,
        each: &mut dyn FnMut(Allocation) -> bool,
    ) -> Result<(), DeviceError> {
        each(Allocation {
            length,
            hole: false,
            zero: false,
        });
        Ok(())
    }
}

/// Answers the control socket of `serve`.
#[derive(Debug)]
struct Server {
    front: FuseFront,
    exit: Exit,
}

impl Handler for Server {
    fn handle(&self, call: Call) -> Result<Reply, Failure> {
        match call.verb {
            Verb::Status(_) => Ok(Reply::new(Outcome::TapStatus(TapStatus {
                pid: std::process::id(),
                fuse_mountpoint: self.front.mountpoint().unwrap_or_default(),
                notices: self.front.notice().into_iter().collect(),
                ..TapStatus::default()
            }))),
            Verb::AttachFuse(request) => {
                let status = self.front.attach(Path::new(&request.holder_socket))?;
                Ok(Reply::new(Outcome::HolderStatus(status)))
            }
            Verb::Stop(_) => {
                self.front.stop();
                let exit = self.exit.clone();
                let mut reply = Reply::done();
                reply.then = Some(Box::new(move || exit.request()));
                Ok(reply)
            }
            _ => Err(Failure::usage("unknown here")),
        }
    }
}

fn serve(control: &Path, paths: &[String], trace: Option<&str>) -> Result<(), Failure> {
    let signals = Signals::block()?;
    memory::enter_write_back_path();
    let mut files: Vec<(String, Arc<dyn BlockDevice>)> = Vec::new();
    for path in paths {
        let failed = |error| Failure::io(&format!("open {path}"), &error);
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        let trace = trace.map(Trace::create).transpose();
        let trace = trace.map_err(|error| Failure::io("create the trace", &error))?;
        let name = Path::new(path)
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        files.push((
            name.unwrap_or_default(),
            Arc::new(FileDevice { file, size, trace }),
        ));
    }
    let exit = Exit::new()?;
    let server = Arc::new(Server {
        front: FuseFront::new(files),
        exit: exit.clone(),
    });
    let listener = listen(control)?;
    let socket = ControlServer::start(listener, control, Arc::clone(&server) as _)
        .map_err(|error| Failure::io("serve the control socket", &error))?;
    report_ready(Outcome::TapStatus(TapStatus::default()));
    signals.wait(&exit);
    server.front.stop();
    socket.stop();
    Ok(())
}

fn tap(control: &str, backing: &str, directory: &str) -> i32 {
    let name = Path::new(backing)
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    let launch = TapLaunch {
        group: vec![7; 16],
        group_name: "test".into(),
        generation_counter: 1,
        generation_site: 1,
        suite: 2,
        key: vec![9; 32],
        volumes: vec![TapVolume {
            index: 0,
            name: name.unwrap_or_default(),
            backing: backing.into(),
        }],
        spool_dir: format!("{directory}/spool"),
        state_dir: format!("{directory}/state"),
        control_socket: control.into(),
        nbd_unix: format!("{directory}/nbd"),
        spool_bytes_max: 64 << 30,
        ..TapLaunch::default()
    };
    server::tap_main(&launch.encode_to_vec())
}

fn request(socket: &str, verb: &str) -> Result<(), String> {
    let verb = match verb.split_once('=') {
        Some(("attach", holder)) => Verb::AttachFuse(AttachFuseRequest {
            holder_socket: holder.into(),
        }),
        _ if verb == "status" => Verb::Status(StatusRequest {}),
        _ if verb == "stop" => Verb::Stop(StopRequest { unmount: false }),
        _ if verb == "unmount" => Verb::Stop(StopRequest { unmount: true }),
        _ => return Err(format!("unknown verb {verb}")),
    };
    let stream = UnixStream::connect(socket).map_err(|error| error.to_string())?;
    let request = Request {
        id: 1,
        verb: Some(verb),
    };
    wire::send(&stream, &request, None).map_err(|error| error.to_string())?;
    let received = wire::receive::<Response>(&stream).map_err(|error| error.to_string())?;
    match received.and_then(|(response, _)| response.result) {
        Some(Outcome::Failure(failure)) => Err(format!("{}: {}", failure.code, failure.message)),
        Some(outcome) => {
            println!("{outcome:?}");
            Ok(())
        }
        None => Err("no answer".into()),
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result: Result<(), String> = match words.as_slice() {
        ["holder", socket, directory] => {
            let launch = HolderLaunch {
                control_socket: (*socket).into(),
                mountpoint: (*directory).into(),
                source: "ebbtide-test".into(),
            };
            let code = server::holder_main(&launch.encode_to_vec());
            return ExitCode::from(u8::try_from(code).unwrap_or(1));
        }
        ["serve", control, _, ..] => {
            serve(&PathBuf::from(control), &arguments[2..], None).map_err(|error| error.to_string())
        }
        ["record", control, trace, _] => {
            serve(&PathBuf::from(control), &arguments[3..], Some(trace))
                .map_err(|error| error.to_string())
        }
        ["tap", control, backing, directory] => {
            let code = tap(control, backing, directory);
            return ExitCode::from(u8::try_from(code).unwrap_or(1));
        }
        ["request", socket, verb] => request(socket, verb),
        ["loop-attach", file] => server::loop_attach(Path::new(file), false)
            .map(|device| println!("{device}"))
            .map_err(|error| error.to_string()),
        ["loop-detach", device] => server::loop_detach(device).map_err(|error| error.to_string()),
        ["loop-list"] => server::loop_list()
            .map(|devices| devices.iter().for_each(|device| println!("{device:?}")))
            .map_err(|error| error.to_string()),
        _ => Err("usage: see the head of fuse_file.rs".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}
