//! Invariant 1, write order: where writes overlap, the order of the backing is the order of seq, so
//! that the newest history equals the source; every older point equals the list of writes up to it.

use proptest::prelude::*;

use super::rig::{FUA, NOWAIT, Random, Rig, WAITS, device, settle};
use crate::device::{BlockDevice, DeviceError};
use crate::tap::IncarnationLimits;
use crate::types::Seq;

/// One change of a volume.
#[derive(Debug, Clone)]
enum Change {
    Write {
        offset: u64,
        length: u64,
        value: u8,
        fua: bool,
    },
    Zero {
        offset: u64,
        length: u64,
    },
    Discard {
        offset: u64,
        length: u64,
    },
    Flush,
}

fn apply(volume: &dyn BlockDevice, change: &Change) {
    match *change {
        Change::Write {
            offset,
            length,
            value,
            fua,
        } => {
            let data = vec![value; length as usize];
            volume
                .write(&data, offset, if fua { FUA } else { WAITS })
                .unwrap();
        }
        Change::Zero { offset, length } => volume.zero(offset, length, WAITS).unwrap(),
        Change::Discard { offset, length } => volume.trim(offset, length, WAITS).unwrap(),
        Change::Flush => volume.flush(WAITS).unwrap(),
    }
}

fn apply_model(image: &mut [u8], change: &Change) {
    let (range, value) = match *change {
        Change::Write {
            offset,
            length,
            value,
            ..
        } => (offset..offset + length, value),
        Change::Zero { offset, length } | Change::Discard { offset, length } => {
            (offset..offset + length, 0)
        }
        Change::Flush => return,
    };
    image[range.start as usize..range.end as usize].fill(value);
}

fn random_change(random: &mut Random, size: u64) -> Change {
    let length = match random.below(4) {
        0 => 512 * (1 + random.below(8)),
        1 => 4096 * (1 + random.below(4)),
        2 => 1 + random.below(9000),
        _ => 4096,
    }
    .min(size);
    let offset = match random.below(3) {
        0 => random.below(size - length + 1),
        _ => (random.below(size - length + 1)) / 4096 * 4096,
    };
    let value = random.below(4) as u8;
    match random.below(16) {
        0 => Change::Zero { offset, length },
        1 => Change::Discard { offset, length },
        2 if random.below(4) == 0 => Change::Flush,
        3 => Change::Write {
            offset,
            length,
            value,
            fua: random.below(4) == 0,
        },
        _ => Change::Write {
            offset,
            length,
            value,
            fua: false,
        },
    }
}

#[test]
fn eight_threads_on_64_blocks_leave_history_equal_to_the_source() {
    let size = 64 * 4096 - 1000;
    let mut rig = Rig::new(&[size, size]);
    // Small enough that incarnations roll over and the ring wraps while writers race.
    rig.queue_bytes = 4 << 20;
    rig.incarnation = IncarnationLimits {
        bytes: 3 << 20,
        ..IncarnationLimits::default()
    };
    let tap = rig.start();
    for round in 0..6u64 {
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let volume = device(&tap, (thread % 2) as u16);
                let mut random = Random((round * 8 + thread + 1) * 0x9e37_79b9);
                scope.spawn(move || {
                    for _ in 0..250 {
                        let change = random_change(&mut random, size);
                        if let (
                            Change::Write {
                                offset,
                                length,
                                value,
                                ..
                            },
                            0,
                        ) = (&change, random.below(3))
                        {
                            let data = vec![*value; *length as usize];
                            match volume.write(&data, *offset, NOWAIT) {
                                Ok(()) => continue,
                                Err(error) => assert_eq!(error, DeviceError::WouldBlock),
                            }
                        }
                        apply(&*volume, &change);
                    }
                });
            }
        });
        let replay = rig.check(&tap);
        if round == 5 {
            assert!(replay.incarnations.len() > 2, "incarnations rolled over");
            assert!(replay.same > 0, "identical blocks were found");
        }
    }
    tap.stop().unwrap();
}

fn change_strategy(size: u64) -> impl Strategy<Value = Change> {
    let range = (0..size, 1..20_000u64)
        .prop_map(move |(offset, length)| (offset, length.min(size - offset)));
    let aligned = (0..size / 4096, 1..5u64)
        .prop_map(move |(block, blocks)| (block * 4096, (blocks * 4096).min(size - block * 4096)));
    let any = prop_oneof![range, aligned];
    (any, 0..12u8, 0..5u8).prop_map(|((offset, length), kind, value)| match kind {
        0 => Change::Zero { offset, length },
        1 => Change::Discard { offset, length },
        2 => Change::Flush,
        3 => Change::Write {
            offset,
            length,
            value,
            fua: true,
        },
        _ => Change::Write {
            offset,
            length,
            value,
            fua: false,
        },
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn every_point_of_history_equals_the_list_of_writes(
        size in 30_000..300_000u64,
        changes in prop::collection::vec(change_strategy(30_000), 1..60),
        restart_after in 0..60usize,
    ) {
        let rig = Rig::new(&[size]);
        let mut tap = rig.start();
        settle(&tap);
        let mut volume = device(&tap, 0);
        let mut image = vec![0; size as usize];
        let mut points: Vec<(Seq, Vec<u8>)> = Vec::new();
        for (index, change) in changes.iter().enumerate() {
            apply(&*volume, change);
            apply_model(&mut image, change);
            points.push((tap.status().last_seq, image.clone()));
            if index == restart_after {
                tap.stop().unwrap();
                drop(tap);
                tap = rig.start();
                volume = device(&tap, 0);
            }
        }
        let replay = rig.check(&tap);
        prop_assert_eq!(&rig.content(0), &image);
        for (seq, image) in points {
            prop_assert!(replay.image(0, size, seq) == image, "at {:?}", seq);
        }
    }
}
