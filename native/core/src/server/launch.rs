//! Values of the launch messages, checked before anything is opened.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;

use super::failure::Failure;
use super::proto;
use crate::constants::{CACHE_BYTES, FRAME_DELAY_MS, VOLUMES_MAX};
use crate::crypto::{GroupKey, Suite};
use crate::format::frame::Digest;
use crate::log::LogEnd;
use crate::types::{FrameNo, GroupId, IncarnationId, Seq, TimeUs, VolumeIndex};

use super::memory::cache_limit;
use crate::tap::{TapConfig, VolumeConfig};
use crate::types::Generation;

pub(super) fn group_id(bytes: &[u8]) -> Result<GroupId, Failure> {
    let bytes = bytes.try_into();
    bytes
        .map(GroupId)
        .map_err(|_| Failure::config("a group's identity has 16 bytes"))
}

/// An empty key is none.
pub(super) fn group_key(bytes: &[u8]) -> Result<Option<GroupKey>, Failure> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let bytes = bytes.try_into();
    bytes
        .map(GroupKey)
        .map(Some)
        .map_err(|_| Failure::config("a group key has 32 bytes"))
}

/// An empty address is none.
pub(super) fn address(text: &str) -> Result<Option<SocketAddr>, Failure> {
    if text.is_empty() {
        return Ok(None);
    }
    let parsed = text.parse();
    parsed
        .map(Some)
        .map_err(|_| Failure::config(format!("{text:?} is not ADDRESS:PORT")))
}

/// An absolute path: a server's working directory is nobody's business.
pub(super) fn path<'a>(what: &str, text: &'a str) -> Result<&'a Path, Failure> {
    let path = Path::new(text);
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(Failure::config(format!(
            "{what} {text:?} is not an absolute path"
        )))
    }
}

pub(super) fn log_end(end: &proto::LogEnd) -> Result<LogEnd, Failure> {
    let wrong = |_| Failure::usage("the log's end has fields of a wrong length");
    let incarnation: Option<[u8; 16]> = match end.incarnation.as_slice() {
        [] => None,
        bytes => Some(bytes.try_into().map_err(wrong)?),
    };
    let last_digest: Digest = match end.last_digest.as_slice() {
        [] => Digest::default(),
        bytes => bytes.try_into().map_err(wrong)?,
    };
    Ok(LogEnd {
        incarnation: incarnation.map(IncarnationId),
        ordinal: end.ordinal,
        last_frame: end.has_frame.then_some(FrameNo(end.last_frame)),
        last_digest,
        last_seq: Seq(end.last_seq),
        last_time: TimeUs(end.last_time_us),
        open_first_frame: end.has_open.then_some(FrameNo(end.open_first_frame)),
        committed_len: end.committed_len,
        total_bytes: end.total_bytes,
    })
}

impl From<&LogEnd> for proto::LogEnd {
    fn from(end: &LogEnd) -> Self {
        Self {
            incarnation: end.incarnation.map(|id| id.0.to_vec()).unwrap_or_default(),
            ordinal: end.ordinal,
            has_frame: end.last_frame.is_some(),
            last_frame: end.last_frame.unwrap_or_default().0,
            last_digest: end.last_digest.to_vec(),
            last_seq: end.last_seq.0,
            last_time_us: end.last_time.0,
            has_open: end.open_first_frame.is_some(),
            open_first_frame: end.open_first_frame.unwrap_or_default().0,
            committed_len: end.committed_len,
            total_bytes: end.total_bytes,
        }
    }
}

/// The tap's configuration, its caches bounded by the memory that we may use.
pub(super) fn tap_config(launch: &proto::TapLaunch) -> Result<TapConfig, Failure> {
    let suite = u16::try_from(launch.suite)
        .ok()
        .and_then(|value| Suite::try_from(value).ok());
    if launch.volumes.is_empty() || launch.volumes.len() > VOLUMES_MAX {
        return Err(Failure::config(format!(
            "a group has 1 to {VOLUMES_MAX} volumes"
        )));
    }
    let (mut indexes, mut names) = (BTreeSet::new(), BTreeSet::new());
    let mut volumes = Vec::with_capacity(launch.volumes.len());
    for volume in &launch.volumes {
        let index = u16::try_from(volume.index)
            .map_err(|_| Failure::config(format!("volume index {} is too large", volume.index)))?;
        if !indexes.insert(index) || !names.insert(&volume.name) {
            let message = format!("volume {} ({}) is named twice", index, volume.name);
            return Err(Failure::config(message));
        }
        volumes.push(VolumeConfig {
            index: VolumeIndex(index),
            name: volume.name.clone(),
            backing: path("the backing", &volume.backing)?.to_owned(),
        });
    }
    let or_default = |value, default| if value == 0 { default } else { value };
    Ok(TapConfig {
        group: group_id(&launch.group)?,
        generation: Generation {
            counter: launch.generation_counter,
            site: launch.generation_site,
        },
        suite: suite
            .ok_or_else(|| Failure::config(format!("suite {} is unknown", launch.suite)))?,
        key: group_key(&launch.key)?,
        volumes,
        spool: path("the spool", &launch.spool_dir)?.to_owned(),
        state: path("the state directory", &launch.state_dir)?.to_owned(),
        spool_bytes_max: launch.spool_bytes_max,
        cache_bytes: cache_limit(or_default(launch.cache_bytes, CACHE_BYTES as u64)),
        frame_delay_ms: or_default(launch.frame_delay_ms, FRAME_DELAY_MS),
        kept: launch.kept,
    })
}

#[cfg(test)]
mod tests {
    use super::super::proto::{TapLaunch, TapVolume};
    use super::*;

    fn volume(index: u32, name: &str) -> TapVolume {
        TapVolume {
            index,
            name: name.into(),
            backing: "/dev/null".into(),
        }
    }

    fn launch() -> TapLaunch {
        TapLaunch {
            group: vec![1; 16],
            suite: 2,
            key: vec![2; 32],
            volumes: vec![volume(0, "a"), volume(7, "b")],
            spool_dir: "/spool".into(),
            state_dir: "/state".into(),
            ..TapLaunch::default()
        }
    }

    #[test]
    fn a_good_message_becomes_a_configuration_with_defaults() {
        let config = tap_config(&launch()).unwrap();
        assert_eq!(config.frame_delay_ms, FRAME_DELAY_MS);
        assert!(config.cache_bytes <= CACHE_BYTES);
        assert_eq!(config.volumes[1].index, VolumeIndex(7));
        assert!(config.key.is_some());
    }

    #[test]
    fn every_wrong_value_is_named() {
        type Change = fn(&mut TapLaunch);
        let changes: [(Change, &str); 9] = [
            (|launch| launch.group.truncate(15), "16 bytes"),
            (|launch| launch.key.push(0), "32 bytes"),
            (|launch| launch.suite = 3, "suite 3"),
            (|launch| launch.volumes.clear(), "volumes"),
            (|launch| launch.volumes.push(volume(0, "c")), "twice"),
            (|launch| launch.volumes.push(volume(1, "a")), "twice"),
            (|launch| launch.volumes.push(volume(65536, "c")), "65536"),
            (|launch| launch.spool_dir = "spool".into(), "absolute"),
            (
                |launch| launch.volumes[0].backing = String::new(),
                "absolute",
            ),
        ];
        for (change, word) in changes {
            let mut message = launch();
            change(&mut message);
            let failure = tap_config(&message).unwrap_err();
            assert!(
                failure.message.contains(word),
                "{failure:?} does not name {word}"
            );
        }
        assert!(address("localhost").is_err());
        assert_eq!(address("").unwrap(), None);
    }

    #[test]
    fn the_logs_end_survives_the_way_to_another_process() {
        let end = LogEnd {
            incarnation: Some(IncarnationId([3; 16])),
            ordinal: 4,
            last_frame: Some(FrameNo(0)),
            last_digest: [5; 32],
            last_seq: Seq(6),
            last_time: TimeUs(7),
            open_first_frame: None,
            committed_len: 8,
            total_bytes: 9,
        };
        for end in [end, LogEnd::default()] {
            assert_eq!(log_end(&proto::LogEnd::from(&end)).unwrap(), end);
        }
        let short = proto::LogEnd {
            incarnation: vec![1; 3],
            ..proto::LogEnd::default()
        };
        assert!(log_end(&short).is_err());
    }
}
