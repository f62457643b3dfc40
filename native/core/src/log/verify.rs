//! Reads all of a log again and says where it is damaged. Needs no key and no lock: beside a writer
//! it may miss the newest frames, and what is being trimmed.

use std::sync::Arc;

use super::names::{self, SegmentId, SegmentState};
use super::recovery::{list_segments, read_manifest};
use super::{Home, LogError, synced, walk};
use crate::format::FormatError;
use crate::format::manifest::{Manifest, SegmentEntry};
use crate::storage::Directory;
use crate::types::GroupId;

/// One bad place of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub file: String,
    pub offset: u64,
    pub source: FormatError,
}

fn finding(file: &str, offset: u64, source: FormatError) -> Finding {
    Finding {
        file: file.to_owned(),
        offset,
        source,
    }
}

/// Compares what a walk found with what the manifest says.
fn check_entry(name: &str, walk: &walk::Walk, listed: &SegmentEntry) -> Option<Finding> {
    let found = walk.entry.as_ref().map(|entry| SegmentEntry {
        indexed: listed.indexed,
        ..entry.clone()
    });
    let same = found.as_ref() == Some(listed);
    let (what, field, reason) = ("segment", "manifest entry", "not what the segment holds");
    (!same && walk.damage.is_empty()).then(|| {
        finding(
            name,
            walk.valid_len,
            FormatError::Field {
                what,
                field,
                reason,
            },
        )
    })
}

/// Verifies manifest, sealed segments and what is known durable of open ones: checksums, digests,
/// the chain of frames within and between segments. Returns the bad places.
pub fn verify(directory: &Arc<dyn Directory>, group: GroupId) -> Result<Vec<Finding>, LogError> {
    let home = Home {
        directory: Arc::clone(directory),
        group,
    };
    let mut findings = Vec::new();
    let manifest = match read_manifest(&home)? {
        Ok(manifest) => manifest.unwrap_or_default(),
        Err(error) => {
            findings.push(finding(names::MANIFEST, 0, error));
            Manifest::default()
        }
    };
    let note = synced::read(&**directory).map_err(LogError::io("reading what is durable"))?;
    let files = list_segments(&home)?;
    for entry in &manifest.segments {
        let id = SegmentId::of(entry);
        if !files.iter().any(|(listed, _)| *listed == id) {
            let need = usize::try_from(entry.bytes).unwrap_or(usize::MAX);
            let missing = FormatError::Truncated {
                what: "sealed segment",
                need,
                have: 0,
            };
            findings.push(finding(&names::sealed_name(entry), 0, missing));
        }
    }
    let mut last: Option<(SegmentId, walk::Walk)> = None;
    for (id, state) in files {
        let name = id.file_name(state);
        let sealed = matches!(state, SegmentState::Sealed { .. });
        if matches!(state, SegmentState::Gone { .. }) {
            continue;
        }
        let file = match directory.open(&name, false) {
            Ok(file) => file,
            // Sealed or trimmed since it was listed.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(LogError::io("opening a segment")(error)),
        };
        let walked = walk::walk(&*file, id, group, |header| {
            let noted = note.map_or(0, |note| note.known_len(id, header.incarnation));
            if sealed { u64::MAX } else { noted }
        })?;
        let walk = match walked {
            Ok(walk) => walk,
            Err(error) => {
                findings.push(finding(&name, 0, error));
                last = None;
                continue;
            }
        };
        findings.extend(
            walk.damage
                .iter()
                .map(|d| finding(&name, d.offset, d.source.clone())),
        );
        if let Some(listed) = manifest
            .segments
            .iter()
            .find(|entry| SegmentId::of(entry) == id)
        {
            findings.extend(check_entry(&name, &walk, listed));
        }
        if let Some((before, held)) = &last {
            let same = before.ordinal == id.ordinal && walk.entry.is_some();
            if same && held.last_digest != walk.first_prev && walk.damage.is_empty() {
                let (what, field) = ("frame header", "prev");
                let reason = "not the digest of the frame before";
                findings.push(finding(
                    &name,
                    0,
                    FormatError::Field {
                        what,
                        field,
                        reason,
                    },
                ));
            }
        }
        last = Some((id, walk));
    }
    Ok(findings)
}
