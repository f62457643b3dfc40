//! Incident: the server of a mounted file system is killed. Its successor takes the descriptor
//! from the holder and the kernel sends it what the dead one had not answered: no I/O error,
//! nothing that was flushed is lost. The same when the holder is killed, and when both are while a
//! keeper (here the test, else the agent) has a duplicate of the descriptor.
//!
//! Needs root, /dev/fuse, loop devices and e2fsprogs; elsewhere each test says so and does nothing.
//! The processes are those of the example `fuse_file`.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ebbtide_core::server::HolderLink;

/// The example's program, built now: `cargo test --test` alone would leave an old one.
fn example() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Ok(cargo) = std::env::var("CARGO") {
            let arguments = [
                "build",
                "-q",
                "-p",
                "ebbtide-core",
                "--example",
                "fuse_file",
            ];
            let built = Command::new(cargo).args(arguments).status().unwrap();
            assert!(built.success(), "the example must build");
        }
        // .../debug/deps/fuse_takeover-HASH -> .../debug/examples/fuse_file
        let test = std::env::current_exe().unwrap();
        test.ancestors().nth(2).unwrap().join("examples/fuse_file")
    })
}

fn able() -> bool {
    let tool = |name: &str| Command::new(name).arg("-V").output().is_ok();
    let able = rustix::process::geteuid().is_root()
        && Path::new("/dev/fuse").exists()
        && Path::new("/dev/loop-control").exists()
        && example().exists()
        && tool("mkfs.ext4");
    if !able {
        eprintln!("skipped: needs root, /dev/fuse, /dev/loop-control, mkfs.ext4 and the example");
    }
    able
}

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap()
}

fn must(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn eventually(what: &str, predicate: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !predicate() {
        assert!(Instant::now() < deadline, "not within 10 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Holder, server, loop device and mount; takes everything away again, whatever happened.
struct Rig {
    directory: tempfile::TempDir,
    holder: Option<Child>,
    server: Option<Child>,
    device: Option<String>,
}

impl Rig {
    fn new(size: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        File::create(directory.path().join("disk"))
            .unwrap()
            .set_len(size)
            .unwrap();
        std::fs::create_dir(directory.path().join("fs")).unwrap();
        let mut rig = Self {
            directory,
            holder: None,
            server: None,
            device: None,
        };
        rig.start_holder();
        rig.start_server();
        rig
    }

    fn path(&self, name: &str) -> String {
        self.directory
            .path()
            .join(name)
            .to_str()
            .unwrap()
            .to_owned()
    }

    fn spawn(&self, arguments: &[&str], socket: &str) -> Child {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .unwrap();
        let child = Command::new(example())
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let answers = || self.request(socket, "status").status.success();
        eventually("the process answers", answers);
        child
    }

    fn start_holder(&mut self) {
        let child = self.spawn(&["holder", &self.path("h"), &self.path("mnt")], "h");
        self.holder = Some(child);
    }

    fn start_server(&mut self) {
        let child = self.spawn(&["serve", &self.path("s"), &self.path("disk")], "s");
        self.server = Some(child);
        self.attach_fuse();
    }

    fn attach_fuse(&self) {
        let output = self.request("s", &format!("attach={}", self.path("h")));
        assert!(output.status.success(), "{output:?}");
    }

    fn request(&self, socket: &str, verb: &str) -> Output {
        run(
            example().to_str().unwrap(),
            &["request", &self.path(socket), verb],
        )
    }

    /// Makes a file system and mounts it.
    fn mount(&mut self) {
        let file = self.path("mnt/disk");
        let device = must(example().to_str().unwrap(), &["loop-attach", &file]);
        self.device = Some(device.clone());
        must("mkfs.ext4", &["-q", &device]);
        must("mount", &[&device, &self.path("fs")]);
    }

    fn kill(child: &mut Option<Child>) {
        let mut child = child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Ends it in order, and checks the file system that is left.
    fn finish(&mut self) {
        must("umount", &[&self.path("fs")]);
        let device = self.device.take().unwrap();
        must(example().to_str().unwrap(), &["loop-detach", &device]);
        let unmounted = self.request("h", "unmount");
        assert!(unmounted.status.success(), "{unmounted:?}");
        assert!(self.request("s", "stop").status.success());
        must("fsck.ext4", &["-fn", &self.path("disk")]);
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "{}",
                std::fs::read_to_string(self.path("log")).unwrap_or_default()
            );
        }
        // Without a server everything below would wait: with both gone the kernel fails it instead.
        for child in [&mut self.server, &mut self.holder].into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
        run("umount", &["-l", &self.path("fs")]);
        if let Some(device) = &self.device {
            run("losetup", &["-d", device]);
        }
        run("umount", &["-l", &self.path("mnt")]);
    }
}

/// Content of the n-th file: its number, many times.
fn content(n: u32) -> Vec<u8> {
    n.to_le_bytes().repeat(64 << 10 >> 2)
}

/// Writes and syncs files until told to stop; returns how many are durable.
fn write_files(directory: &Path, stop: &AtomicBool) -> u32 {
    let mut count = 0;
    while !stop.load(Ordering::SeqCst) {
        let mut file = File::create(directory.join(count.to_string())).expect("create");
        file.write_all(&content(count)).expect("write");
        file.sync_all().expect("fsync");
        count += 1;
        if count % 7 == 0 {
            // Discards and metadata traffic beside it.
            let _ = std::fs::remove_file(directory.join("scratch"));
            std::fs::write(directory.join("scratch"), vec![7; 1 << 20]).expect("scratch");
        }
    }
    count
}

fn check_files(directory: &Path, count: u32) {
    for n in 0..count {
        let found = std::fs::read(directory.join(n.to_string())).unwrap();
        assert!(
            found == content(n),
            "file {n} was flushed and has other content now"
        );
    }
}

/// Lets the writers end, also when the test fails in the middle.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn killed_servers_and_holders_lose_nothing_that_was_flushed() {
    if !able() {
        return;
    }
    let mut rig = Rig::new(256 << 20);
    rig.mount();
    let directory = PathBuf::from(rig.path("fs"));
    let stop = AtomicBool::new(false);
    let (mut rig, count) = std::thread::scope(|scope| {
        // Dropped on a panic, so that the writer ends with an error instead of waiting for ever.
        let _stop = StopOnDrop(&stop);
        let mut rig = rig;
        let writer = scope.spawn(|| write_files(&directory, &stop));
        let mut pause = 3;
        for round in 0..12 {
            std::thread::sleep(Duration::from_millis(pause));
            pause = pause * 7 % 97 + 1;
            if round % 4 == 3 {
                Rig::kill(&mut rig.holder);
                rig.start_holder();
                rig.attach_fuse();
            } else {
                Rig::kill(&mut rig.server);
                rig.start_server();
            }
        }
        std::thread::sleep(Duration::from_millis(50));
        stop.store(true, Ordering::SeqCst);
        (rig, writer.join().unwrap())
    });
    assert!(count > 0);
    // From the medium, not from the page cache.
    must("umount", &[&rig.path("fs")]);
    let device = rig.device.clone().unwrap();
    must("mount", &[&device, &rig.path("fs")]);
    check_files(&directory, count);
    rig.finish();
}

#[test]
fn a_keepers_duplicate_carries_the_mount_over_the_death_of_server_and_holder() {
    if !able() {
        return;
    }
    let mut rig = Rig::new(256 << 20);
    rig.mount();
    let directory = PathBuf::from(rig.path("fs"));
    let stop = AtomicBool::new(false);
    let (mut rig, count) = std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        let mut rig = rig;
        let writer = scope.spawn(|| write_files(&directory, &stop));
        for round in 0..4 {
            std::thread::sleep(Duration::from_millis(30));
            let socket = PathBuf::from(rig.path("h"));
            let kept = HolderLink::copy(&socket).unwrap();
            if round % 2 == 0 {
                Rig::kill(&mut rig.server);
                Rig::kill(&mut rig.holder);
            } else {
                Rig::kill(&mut rig.holder);
                Rig::kill(&mut rig.server);
            }
            rig.start_holder();
            assert!(HolderLink::keep(&socket, &kept).unwrap().holding);
            drop(kept);
            rig.start_server();
        }
        std::thread::sleep(Duration::from_millis(50));
        stop.store(true, Ordering::SeqCst);
        (rig, writer.join().unwrap())
    });
    assert!(count > 0);
    must("umount", &[&rig.path("fs")]);
    let device = rig.device.clone().unwrap();
    must("mount", &[&device, &rig.path("fs")]);
    check_files(&directory, count);
    rig.finish();
}

#[test]
fn requests_in_flight_at_the_kill_are_answered_by_the_successor() {
    if !able() {
        return;
    }
    let rig = Rig::new(64 << 20);
    let file = File::options()
        .read(true)
        .write(true)
        .open(rig.path("mnt/disk"))
        .unwrap();
    let stop = AtomicBool::new(false);
    let (rig, writes) = std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        let mut rig = rig;
        let mut writers = Vec::new();
        let (file, stop) = (&file, &stop);
        for writer in 0..6u64 {
            writers.push(scope.spawn(move || {
                let mut count = 0u64;
                while !stop.load(Ordering::SeqCst) {
                    let block = [writer, count].map(u64::to_le_bytes).concat().repeat(256);
                    file.write_all_at(&block, (writer * 1024 + count % 1024) * 4096)
                        .unwrap();
                    count += 1;
                }
                count
            }));
        }
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(10));
            Rig::kill(&mut rig.server);
            rig.start_server();
        }
        stop.store(true, Ordering::SeqCst);
        let counts: Vec<u64> = writers
            .into_iter()
            .map(|writer| writer.join().unwrap())
            .collect();
        (rig, counts)
    });
    assert_eq!(writes.len(), 6);
    for (writer, count) in (0u64..).zip(writes) {
        assert!(count > 20, "writer {writer} came to {count} writes only");
        for n in count.saturating_sub(1024)..count {
            let mut block = vec![0; 4096];
            file.read_exact_at(&mut block, (writer * 1024 + n % 1024) * 4096)
                .unwrap();
            assert!(block == [writer, n].map(u64::to_le_bytes).concat().repeat(256));
        }
    }
    drop(file);
    assert!(rig.request("h", "unmount").status.success());
}

#[test]
fn a_mount_has_one_server_and_is_not_unmounted_while_in_use() {
    if !able() {
        return;
    }
    let rig = Rig::new(1 << 20);
    std::fs::write(rig.path("other"), [0; 4096]).unwrap();
    let mut second = rig.spawn(&["serve", &rig.path("s2"), &rig.path("other")], "s2");
    let refused = rig.request("s2", &format!("attach={}", rig.path("h")));
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("served by another process"));
    second.kill().unwrap();
    second.wait().unwrap();

    let open = File::open(rig.path("mnt/disk")).unwrap();
    let busy = rig.request("h", "unmount");
    assert!(
        String::from_utf8_lossy(&busy.stderr).contains("in-use"),
        "{busy:?}"
    );
    drop(open);
    assert!(rig.request("h", "unmount").status.success());
}

#[test]
fn a_mount_that_lost_holder_and_server_is_replaced() {
    if !able() {
        return;
    }
    let mut rig = Rig::new(1 << 20);
    let open = File::open(rig.path("mnt/disk")).unwrap();
    Rig::kill(&mut rig.holder);
    Rig::kill(&mut rig.server);
    assert!(
        std::fs::metadata(rig.path("mnt")).is_err(),
        "the connection should be dead"
    );
    rig.start_holder();
    rig.start_server();
    assert_eq!(
        std::fs::metadata(rig.path("mnt/disk")).unwrap().len(),
        1 << 20
    );
    drop(open);
    assert!(rig.request("h", "unmount").status.success());
}
