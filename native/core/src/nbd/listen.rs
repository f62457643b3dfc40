//! Sockets to listen on, and those that were accepted.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, chmod, lstat, unlink};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
    sockopt,
};

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 128;
/// A TCP client that vanished is noticed after about a minute.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_COUNT: u32 = 3;

/// The file of a listening unix socket; removed when dropped, if it is still the same.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            // Somebody else may remove it first.
            let _ = unlink(&self.path);
        }
    }
}

fn identity(path: &Path) -> Result<(u64, u64), Errno> {
    lstat(path).map(|stat| (stat.st_dev, stat.st_ino))
}

/// Listens on `path`, for this user only. The file of a server that died is replaced; a live
/// server's, or a file that is no socket, is `AddrInUse`.
pub(super) fn unix(path: &Path) -> std::io::Result<(OwnedFd, SocketFile)> {
    let address = SocketAddrUnix::new(path)?;
    let socket = stream_socket(AddressFamily::UNIX)?;
    match bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            let probe = stream_socket(AddressFamily::UNIX)?;
            match connect(&probe, &address) {
                Err(Errno::CONNREFUSED) => {}
                _ => return Err(Errno::ADDRINUSE.into()),
            }
            if !rustix::fs::FileType::from_raw_mode(lstat(path)?.st_mode).is_socket() {
                return Err(Errno::ADDRINUSE.into());
            }
            unlink(path)?;
            bind(&socket, &address)?;
        }
        other => other?,
    }
    let file = SocketFile {
        path: path.to_path_buf(),
        identity: identity(path)?,
    };
    chmod(path, Mode::RUSR | Mode::WUSR)?;
    listen(&socket, BACKLOG)?;
    Ok((socket, file))
}

/// Listens on a TCP address; returns the one that was bound.
pub(super) fn tcp(address: SocketAddr) -> std::io::Result<(OwnedFd, SocketAddr)> {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let socket = stream_socket(family)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &address)?;
    listen(&socket, BACKLOG)?;
    let bound = rustix::net::getsockname(&socket)?;
    let bound = SocketAddr::try_from(bound).map_err(std::io::Error::from)?;
    Ok((socket, bound))
}

fn stream_socket(family: AddressFamily) -> Result<OwnedFd, Errno> {
    socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)
}

/// Sets up an accepted TCP connection.
pub(super) fn prepare_tcp(socket: impl AsFd) -> Result<(), Errno> {
    let socket = socket.as_fd();
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVE_COUNT)
}
