//! `docs/format/` and the code say the same, field by field. Fails when either changes alone.
//!
//! To add a page: export `pub const LAYOUT: &[Field]` from your module (`format::layout` has the
//! type, `covers` proves it gapless at compile time; a list of named numbers is
//! `pub const VALUES: &[(&str, u64)]`), write the page with a table under a heading of its own,
//! and add a line to `LAYOUTS` or `VALUES`. A table of fields has the columns `offset`, `size`,
//! `field` first, then at least one sentence per field; a table of numbers has `value`, `name`
//! first. Reserved fields are named `reserved_<offset>`. Every page has the `REQUIRED_SECTIONS`
//! and a table of damage.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use ebbtide_core::crypto;
use ebbtide_core::format::{Field, frame, manifest, record, segment};
use ebbtide_core::index;
use ebbtide_core::log::synced;
use ebbtide_core::tap;
use ebbtide_core::view::presence;

/// Page, heading above the table, layout in the code.
const LAYOUTS: &[(&str, &str, &[Field])] = &[
    ("frame.md", "Header", frame::LAYOUT),
    ("segment.md", "Header", segment::LAYOUT),
    ("manifest.md", "Header", manifest::LAYOUT),
    ("index-run.md", "Header", index::layout::LAYOUT),
    ("index-run.md", "Member", index::layout::MEMBER_LAYOUT),
    ("index-run.md", "Lane", index::layout::LANE_LAYOUT),
    ("overlay.md", "Header", presence::LAYOUT),
    ("state.md", "Slot", tap::state::LAYOUT),
    ("write-intent-bitmap.md", "Header", tap::intent::LAYOUT),
    ("write-intent-bitmap.md", "Page", tap::intent::PAGE_LAYOUT),
    ("overlay.md", "Slot", presence::SLOT_LAYOUT),
    ("log-directory.md", "Synced note", synced::LAYOUT),
];

/// Numbers by name.
type Values = &'static [(&'static str, u64)];

/// Page, heading above the table, named numbers in the code.
const VALUES: &[(&str, &str, Values)] = &[
    ("frame.md", "Flags", frame::FLAG_VALUES),
    ("frame.md", "Suites", crypto::SUITE_VALUES),
    ("frame.md", "Limits", frame::LIMIT_VALUES),
    ("record-table.md", "Kinds", record::KIND_VALUES),
    (
        "record-table.md",
        "Payload modes",
        record::PAYLOAD_MODE_VALUES,
    ),
    ("record-table.md", "Causes", record::CAUSE_VALUES),
    ("record-table.md", "Cell encodings", record::ENCODING_VALUES),
    ("record-table.md", "Limits", record::LIMIT_VALUES),
    ("manifest.md", "Limits", manifest::LIMIT_VALUES),
    ("index-run.md", "Entry", index::entry::ENTRY_BITS),
    ("index-run.md", "Kinds", index::entry::KIND_VALUES),
    ("overlay.md", "States", presence::STATE_VALUES),
];

/// What a reader of a page can count on.
const REQUIRED_SECTIONS: &[&str] = &["Media assumptions", "Damage", "History"];

fn pages() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/format")
}

fn page(name: &str) -> String {
    let path = pages().join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn heading(line: &str) -> Option<&str> {
    line.starts_with('#')
        .then(|| line.trim_start_matches('#').trim())
}

/// Rows of the first table under `wanted`, without its head; cells trimmed, code marks removed.
/// `columns` are the names that the table must begin with.
fn table(page: &str, wanted: &str, columns: &[&str]) -> Vec<Vec<String>> {
    let cells = |line: &str| -> Vec<String> {
        let line = line.trim();
        let line = line.strip_prefix('|').unwrap_or(line);
        let line = line.strip_suffix('|').unwrap_or(line);
        line.split('|')
            .map(|cell| cell.trim().replace('`', ""))
            .collect()
    };
    let mut lines = page
        .lines()
        .skip_while(|line| heading(line) != Some(wanted))
        .skip(1)
        .take_while(|line| heading(line).is_none())
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'));
    let head = lines
        .next()
        .unwrap_or_else(|| panic!("no table under the heading {wanted:?}"));
    let head = cells(head);
    assert!(head.len() >= columns.len(), "columns under {wanted:?}");
    assert_eq!(&head[..columns.len()], columns, "columns under {wanted:?}");
    let rule = lines.next().expect("a table has a rule under its head");
    assert!(
        rule.chars().all(|c| "|-: ".contains(c)),
        "rule under {wanted:?}"
    );
    let rows: Vec<_> = lines.map(cells).collect();
    assert!(
        rows.iter().all(|row| row.len() == head.len()),
        "cells under {wanted:?}"
    );
    rows
}

#[test]
fn field_tables_agree_with_the_code() {
    for (name, wanted, layout) in LAYOUTS {
        let rows = table(&page(name), wanted, &["offset", "size", "field"]);
        let written: Vec<String> = rows.iter().map(|row| row[..3].join(" ")).collect();
        let coded: Vec<String> = layout
            .iter()
            .map(|field| format!("{} {} {}", field.offset, field.len, field.name))
            .collect();
        assert_eq!(
            written, coded,
            "{name}, {wanted}: page (left) and code (right)"
        );
        for row in rows {
            let described = row.len() > 3 && row.last().is_some_and(|text| text.ends_with('.'));
            assert!(described, "{name}: {} has no sentence", row[2]);
        }
    }
}

#[test]
fn value_tables_agree_with_the_code() {
    for (name, wanted, values) in VALUES {
        let rows = table(&page(name), wanted, &["value", "name"]);
        let written: Vec<String> = rows.iter().map(|row| row[..2].join(" ")).collect();
        let coded: Vec<String> = values
            .iter()
            .map(|(name, value)| format!("{value} {name}"))
            .collect();
        assert_eq!(
            written, coded,
            "{name}, {wanted}: page (left) and code (right)"
        );
    }
}

#[test]
fn every_page_is_compared_and_has_its_sections() {
    let compared: BTreeSet<&str> = LAYOUTS
        .iter()
        .map(|row| row.0)
        .chain(VALUES.iter().map(|row| row.0))
        .collect();
    for entry in fs::read_dir(pages()).expect("docs/format exists") {
        let name = entry.expect("a readable directory").file_name();
        let name = name.to_str().expect("page names are ASCII");
        assert!(
            compared.contains(name),
            "{name}: add it to LAYOUTS or VALUES of this test"
        );
        let text = page(name);
        for section in REQUIRED_SECTIONS {
            let has = text.lines().any(|line| heading(line) == Some(*section));
            assert!(has, "{name} lacks the section {section:?}");
        }
        let damage = table(&text, "Damage", &["damage", "finding", "action"]);
        assert!(!damage.is_empty(), "{name}: an empty table of damage");
    }
}

/// The parser itself: a test that cannot fail would be of no use.
#[test]
fn another_table_is_not_taken_for_the_wanted_one() {
    let page = "# P\n## A\n\ntext\n\n| offset | size | field | is |\n|--:|--|--|--|\n\
                | 0 | 8 | `m` | M. |\n\n| x |\n|--|\n| y |\n## B\ntext\n## C\n";
    assert_eq!(
        table(page, "A", &["offset", "size", "field"]),
        [["0", "8", "m", "M."]]
    );
    for (wanted, column) in [("B", "offset"), ("D", "offset"), ("A", "size")] {
        let found = std::panic::catch_unwind(|| table(page, wanted, &[column]));
        assert!(found.is_err(), "{wanted} {column}");
    }
}
