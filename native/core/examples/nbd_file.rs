//! Serves a plain file over NBD, without history: what the server's tests and measurements run
//! against. Usage:
//! `nbd_file FILE (--unix PATH | --tcp ADDRESS:PORT)... [--read-only] [--name NAME]`
//!
//! Prints `ready` (and the bound TCP address) on standard output, and serves until its standard
//! input ends.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use ebbtide_core::device::{Allocation, BlockDevice, DeviceError, DeviceInfo, RequestFlags};
use ebbtide_core::nbd::{Export, Server};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2};

#[derive(Debug)]
struct FileDevice {
    file: File,
    size: u64,
    read_only: bool,
}

fn device_error(error: &std::io::Error) -> DeviceError {
    DeviceError::Io(error.raw_os_error().unwrap_or(libc::EIO))
}

fn errno(errno: Errno) -> DeviceError {
    DeviceError::Io(errno.raw_os_error())
}

impl FileDevice {
    fn deallocate(
        &self,
        mode: FallocateFlags,
        offset: u64,
        length: u64,
        flags: RequestFlags,
    ) -> Result<(), DeviceError> {
        if flags.nowait {
            return Err(DeviceError::WouldBlock);
        }
        fallocate(&self.file, mode | FallocateFlags::KEEP_SIZE, offset, length).map_err(errno)?;
        if flags.fua { self.flush(flags) } else { Ok(()) }
    }
}

impl BlockDevice for FileDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            size: self.size,
            read_only: self.read_only,
            multi_conn: true,
        }
    }

    fn read(&self, buffer: &mut [u8], offset: u64, flags: RequestFlags) -> Result<(), DeviceError> {
        if !flags.nowait {
            return self
                .file
                .read_exact_at(buffer, offset)
                .map_err(|error| device_error(&error));
        }
        let length = buffer.len();
        let mut parts = [IoSliceMut::new(buffer)];
        match preadv2(&self.file, &mut parts, offset, ReadWriteFlags::NOWAIT) {
            Ok(count) if count == length => Ok(()),
            Ok(_) | Err(Errno::AGAIN | Errno::OPNOTSUPP) => Err(DeviceError::WouldBlock),
            Err(error) => Err(errno(error)),
        }
    }

    fn write(&self, data: &[u8], offset: u64, flags: RequestFlags) -> Result<(), DeviceError> {
        if !flags.fua {
            return self
                .file
                .write_all_at(data, offset)
                .map_err(|error| device_error(&error));
        }
        if flags.nowait {
            return Err(DeviceError::WouldBlock);
        }
        let mut done = 0;
        while done < data.len() {
            let parts = [IoSlice::new(&data[done..])];
            let at = offset + done as u64;
            done += pwritev2(&self.file, &parts, at, ReadWriteFlags::DSYNC).map_err(errno)?;
        }
        Ok(())
    }

    fn flush(&self, flags: RequestFlags) -> Result<(), DeviceError> {
        if flags.nowait {
            return Err(DeviceError::WouldBlock);
        }
        self.file.sync_data().map_err(|error| device_error(&error))
    }

    fn trim(&self, offset: u64, length: u64, flags: RequestFlags) -> Result<(), DeviceError> {
        self.deallocate(FallocateFlags::PUNCH_HOLE, offset, length, flags)
    }

    fn zero(&self, offset: u64, length: u64, flags: RequestFlags) -> Result<(), DeviceError> {
        let mode = if flags.no_hole {
            FallocateFlags::ZERO_RANGE
        } else {
            FallocateFlags::PUNCH_HOLE
        };
        self.deallocate(mode, offset, length, flags)
    }

    fn allocation(
        &self,
        offset: u64,
        length: u64,
        each: &mut dyn FnMut(Allocation) -> bool,
    ) -> Result<(), DeviceError> {
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let data = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data.min(end),
                Err(Errno::NXIO) => end,
                Err(error) => return Err(errno(error)),
            };
            if data > at
                && !each(Allocation {
                    length: data - at,
                    hole: true,
                    zero: true,
                })
            {
                break;
            }
            at = data;
            if at < end {
                let hole = seek(&self.file, SeekFrom::Hole(at))
                    .map_err(errno)?
                    .min(end);
                if !each(Allocation {
                    length: hole - at,
                    hole: false,
                    zero: false,
                }) {
                    break;
                }
                at = hole;
            }
        }
        Ok(())
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let file = PathBuf::from(arguments.next().ok_or("which file?")?);
    let mut read_only = false;
    let mut name = String::new();
    let mut unix = Vec::new();
    let mut tcp = Vec::new();
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--unix" => unix.push(PathBuf::from(value()?)),
            "--tcp" => tcp.push(value()?.parse()?),
            "--name" => name = value()?,
            "--read-only" => read_only = true,
            _ => return Err(format!("unknown argument {argument}").into()),
        }
    }
    let file = File::options().read(true).write(!read_only).open(file)?;
    let size = file.metadata()?.len();
    let device = Arc::new(FileDevice {
        file,
        size,
        read_only,
    });
    let server = Server::new(vec![Export {
        name,
        description: "a plain file".into(),
        device,
    }]);
    for path in unix {
        server.listen_unix(&path)?;
    }
    for address in tcp {
        println!("tcp {}", server.listen_tcp(address)?);
    }
    println!("ready");
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.stop();
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nbd_file: {error}");
            ExitCode::FAILURE
        }
    }
}
