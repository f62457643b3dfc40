//! Guards the doubles: a crash test is worth what its model of a crash is worth. The shared part
//! runs over real files and memory alike, so that memory cannot drift from what it stands for.

use std::io::ErrorKind;
use std::sync::Arc;

use super::*;

fn directories() -> Vec<(Arc<dyn Directory>, Option<tempfile::TempDir>)> {
    let temporary = tempfile::tempdir().unwrap();
    let disk = DiskDirectory::open(&temporary.path().join("log")).unwrap();
    vec![
        (Arc::new(disk), Some(temporary)),
        (Arc::new(MemoryDirectory::new()), None),
        (
            Arc::new(FaultyDirectory::new(Arc::new(MemoryDirectory::new()))),
            None,
        ),
    ]
}

#[test]
fn all_directories_behave_alike() {
    for (directory, _guard) in directories() {
        let file = directory.create("a").unwrap();
        assert_eq!(
            directory.create("a").unwrap_err().kind(),
            ErrorKind::AlreadyExists
        );
        file.write_at(b"hello", 3).unwrap();
        file.sync_data().unwrap();
        let mut buffer = [9u8; 10];
        assert_eq!(file.read_at(&mut buffer, 0).unwrap(), 8);
        assert_eq!(&buffer[..8], b"\0\0\0hello");
        assert_eq!(file.read_at(&mut buffer, 8).unwrap(), 0);
        file.set_len(4).unwrap();
        assert_eq!(file.len().unwrap(), 4);
        assert!(!file.is_empty().unwrap());
        directory.create("b").unwrap();
        directory.rename("a", "b").unwrap();
        assert_eq!(directory.list().unwrap(), ["b"]);
        assert_eq!(
            directory.open("a", false).unwrap_err().kind(),
            ErrorKind::NotFound
        );
        assert_eq!(
            directory.rename("a", "c").unwrap_err().kind(),
            ErrorKind::NotFound
        );
        assert_eq!(directory.open("b", true).unwrap().len().unwrap(), 4);
        assert!(
            directory
                .open("b", false)
                .unwrap()
                .write_at(b"x", 0)
                .is_err()
        );
        directory.sync().unwrap();
        directory.remove("b").unwrap();
        assert_eq!(
            directory.remove("b").unwrap_err().kind(),
            ErrorKind::NotFound
        );
        file.write_at(b"still here", 0).unwrap();
        assert!(directory.list().unwrap().is_empty());
        assert!(directory.free_bytes().unwrap() > 0);
        for name in ["", ".", "..", "x/y", "/etc"] {
            assert_eq!(
                directory.create(name).unwrap_err().kind(),
                ErrorKind::InvalidInput
            );
        }
    }
}

#[test]
fn locks_exclude_and_share() {
    for (directory, _guard) in directories() {
        let exclusive = directory.lock("lock", true).unwrap();
        assert_eq!(
            directory.lock("lock", true).unwrap_err().kind(),
            ErrorKind::WouldBlock
        );
        assert_eq!(
            directory.lock("lock", false).unwrap_err().kind(),
            ErrorKind::WouldBlock
        );
        drop(exclusive);
        let first = directory.lock("lock", false).unwrap();
        let second = directory.lock("lock", false).unwrap();
        drop(first);
        assert_eq!(
            directory.lock("lock", true).unwrap_err().kind(),
            ErrorKind::WouldBlock
        );
        drop(second);
        directory.lock("lock", true).unwrap();
    }
}

#[test]
fn replace_file_leaves_one_content() {
    for (directory, _guard) in directories() {
        replace_file(&*directory, "state", b"one").unwrap();
        directory.create("state.new").unwrap();
        replace_file(&*directory, "state", b"second").unwrap();
        assert_eq!(read_file(&*directory, "state", 6).unwrap(), b"second");
        assert_eq!(
            read_file(&*directory, "state", 5).unwrap_err().kind(),
            ErrorKind::FileTooLarge
        );
        assert_eq!(directory.list().unwrap(), ["state"]);
    }
}

#[test]
fn symbolic_links_are_not_followed() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = DiskDirectory::open(temporary.path()).unwrap();
    std::fs::write(temporary.path().join("target"), b"x").unwrap();
    std::os::unix::fs::symlink("target", temporary.path().join("link")).unwrap();
    assert!(directory.open("link", false).is_err());
}

#[test]
fn crash_forgets_what_was_not_synced() {
    let memory = MemoryDirectory::new();
    let file = memory.create("kept").unwrap();
    file.write_at(b"durable", 0).unwrap();
    file.sync_data().unwrap();
    memory.sync().unwrap();
    file.write_at(b"XX", 0).unwrap();
    file.set_len(3).unwrap();
    let lost = memory.create("lost").unwrap();
    lost.write_at(b"data without a name", 0).unwrap();
    lost.sync_data().unwrap();

    let killed = memory.fork().crash(Loss::Nothing);
    assert_eq!(killed.content("kept").unwrap(), b"XXr");
    assert_eq!(killed.list().unwrap(), ["kept", "lost"]);

    let _lock = memory.lock("lock", true).unwrap();
    let after = memory.crash(Loss::Everything);
    assert_eq!(after.content("kept").unwrap(), b"durable");
    assert_eq!(after.list().unwrap(), ["kept"]);
    assert!(file.write_at(b"ghost", 0).is_err());
    assert!(memory.list().is_err());
    after.lock("lock", true).unwrap();
}

#[test]
fn random_crash_tears_at_sectors_and_repeats_by_seed() {
    let mut images = std::collections::BTreeSet::new();
    for seed in 0..64 {
        let memory = MemoryDirectory::new();
        let file = memory.create("f").unwrap();
        memory.sync().unwrap();
        file.write_at(&[1; 2000], 100).unwrap();
        let twin = memory.fork();
        let image = memory.crash(Loss::Random(seed)).content("f").unwrap();
        assert_eq!(image, twin.crash(Loss::Random(seed)).content("f").unwrap());
        for sector in image.chunks(SECTOR) {
            let written = sector.iter().map(|byte| usize::from(*byte)).sum::<usize>();
            let nothing = written == 0;
            let first = sector[0] == 0 && written == sector.len() - 100;
            assert!(
                nothing || written == sector.len() || first,
                "torn inside a sector"
            );
        }
        images.insert(image);
    }
    assert!(images.len() > 4, "the seeds differ");
}

const SECTOR: usize = crate::constants::SECTOR_SIZE;

#[test]
fn capacity_cuts_a_write_and_a_removal_gives_room() {
    let memory = MemoryDirectory::new();
    memory.set_capacity(Some(10));
    let file = memory.create("f").unwrap();
    file.write_at(b"12345678", 0).unwrap();
    let error = file.write_at(b"abcdef", 6).unwrap_err();
    assert!(is_full(&error));
    assert_eq!(memory.content("f").unwrap(), b"123456abcd");
    file.write_at(b"in place", 0).unwrap();
    assert_eq!(memory.free_bytes().unwrap(), 0);
    memory.remove("f").unwrap();
    memory
        .create("g")
        .unwrap()
        .write_at(b"0123456789", 0)
        .unwrap();
}

#[test]
fn faults_come_at_the_chosen_operation() {
    let memory = MemoryDirectory::new();
    let faulty = FaultyDirectory::new(Arc::new(memory.clone()));
    let file = faulty.create("f").unwrap();
    faulty.fail_change(2, Fault::Short);
    file.write_at(b"first", 0).unwrap();
    assert_eq!(
        file.write_at(b"abcd", 5).unwrap_err().raw_os_error(),
        Some(libc::EIO)
    );
    assert_eq!(memory.content("f").unwrap(), b"firstab");
    file.sync_data().unwrap();

    faulty.fail_change(1, Fault::Error);
    assert!(file.sync_data().is_err());
    faulty.fail_change(1, Fault::NoSpace);
    assert!(is_full(&file.write_at(b"xyz!", 7).unwrap_err()));
    faulty.fail_read(1);
    assert!(file.read_at(&mut [0; 1], 0).is_err());
    file.read_at(&mut [0; 1], 0).unwrap();

    faulty.fail_change(1, Fault::Stop);
    assert!(faulty.sync().is_err());
    assert!(faulty.stopped() && faulty.list().is_err() && file.sync_data().is_err());
    faulty.heal();

    faulty.limit_space(3);
    let error = file.write_at(b"12345", file.len().unwrap()).unwrap_err();
    assert!(is_full(&error) && memory.content("f").unwrap().ends_with(b"123"));
    assert!(is_full(&faulty.create("g").unwrap_err()));
    assert_eq!(faulty.free_bytes().unwrap(), 0);
    faulty.heal();
    faulty.create("g").unwrap();
}
