//! The records of `record.rs` are those of `record.h`: names, order, offsets and sizes of all members, by the type information
//! (BTF) in the compiled object. Needs no privileges.

use std::collections::HashMap;

use tapio_probes::record::{self, RecordKind};

fn u16_at(bytes: &[u8], offset: usize) -> usize {
    usize::from(u16::from_ne_bytes(bytes[offset..offset + 2].try_into().unwrap()))
}

fn u32_at(bytes: &[u8], offset: usize) -> usize {
    u32::from_ne_bytes(bytes[offset..offset + 4].try_into().unwrap()) as usize
}

fn u64_at(bytes: &[u8], offset: usize) -> usize {
    u64::from_ne_bytes(bytes[offset..offset + 8].try_into().unwrap()) as usize
}

fn name_at(strings: &[u8], offset: usize) -> &str {
    let rest = &strings[offset..];
    let end = rest.iter().position(|&byte| byte == 0).unwrap();
    std::str::from_utf8(&rest[..end]).unwrap()
}

/// A section of a 64-bit ELF file.
fn section<'a>(elf: &'a [u8], name: &str) -> &'a [u8] {
    const SECTION_HEADER_BYTES: usize = 64;
    let headers = &elf[u64_at(elf, 40)..];
    let header = |index: usize| &headers[index * SECTION_HEADER_BYTES..][..SECTION_HEADER_BYTES];
    let content = |header: &[u8]| &elf[u64_at(header, 24)..][..u64_at(header, 32)];
    let names = content(header(u16_at(elf, 62)));
    let found = (0..u16_at(elf, 60)).map(header).find(|header| name_at(names, u32_at(header, 0)) == name);
    content(found.unwrap_or_else(|| panic!("the object has no {name}")))
}

/// A type of BTF, as far as records need it.
enum Type<'a> {
    Int { bytes: usize },
    Array { element: usize, length: usize },
    Struct { name: &'a str, bytes: usize, members: Vec<(&'a str, usize, usize)> },
    Alias { of: usize },
    Other,
}

/// All types, in order; number 0 is `void`.
fn types(btf: &[u8]) -> Vec<Type<'_>> {
    const HEADER_BYTES: usize = 12;
    let (header_bytes, type_bytes) = (u32_at(btf, 4), u32_at(btf, 12));
    let strings = &btf[header_bytes + u32_at(btf, 16)..][..u32_at(btf, 20)];
    let mut rest = &btf[header_bytes + u32_at(btf, 8)..][..type_bytes];
    let mut types = vec![Type::Other];
    while !rest.is_empty() {
        let (info, size_or_type) = (u32_at(rest, 4), u32_at(rest, 8));
        let (kind, count) = (info >> 24 & 0x1f, info & 0xffff);
        let name = name_at(strings, u32_at(rest, 0));
        let details = &rest[HEADER_BYTES..];
        // How many bytes follow the header: see the kernel's Documentation/bpf/btf.rst.
        let detail_bytes = match kind {
            1 | 14 | 17 => 4,
            3 => 12,
            4 | 5 | 15 | 19 => 12 * count,
            6 | 13 => 8 * count,
            _ => 0,
        };
        types.push(match kind {
            1 => Type::Int { bytes: size_or_type },
            3 => Type::Array { element: u32_at(details, 0), length: u32_at(details, 8) },
            4 => {
                let member = |at: usize| {
                    (
                        name_at(strings, u32_at(details, at)),
                        u32_at(details, at + 4),
                        (u32_at(details, at + 8) & 0xff_ffff) / 8,
                    )
                };
                Type::Struct {
                    name,
                    bytes: size_or_type,
                    members: (0..count).map(|index| member(index * 12)).collect(),
                }
            }
            8..=11 => Type::Alias { of: size_or_type },
            _ => Type::Other,
        });
        rest = &rest[HEADER_BYTES + detail_bytes..];
    }
    types
}

fn bytes_of(types: &[Type<'_>], number: usize) -> usize {
    match &types[number] {
        Type::Int { bytes } | Type::Struct { bytes, .. } => *bytes,
        Type::Array { element, length } => bytes_of(types, *element) * length,
        Type::Alias { of } => bytes_of(types, *of),
        Type::Other => panic!("records have integers, arrays and structs only"),
    }
}

/// A struct's size, and its members' names, offsets and sizes.
#[derive(Debug, PartialEq)]
struct Layout {
    bytes: usize,
    members: Vec<(String, usize, usize)>,
}

fn is_record(name: &str) -> bool {
    name == "header" || name.ends_with("_record")
}

fn layouts_in_c(wanted: fn(&str) -> bool) -> HashMap<String, Layout> {
    let btf = section(tapio_probes::object(), ".BTF");
    assert_eq!(u16_at(btf, 0), 0xeb9f, "BTF's magic number");
    let types = types(btf);
    let mut layouts = HashMap::new();
    for candidate in &types {
        if let Type::Struct { name, bytes, members } = candidate
            && wanted(name)
        {
            let members = members
                .iter()
                .map(|&(name, member, offset)| (name.to_owned(), offset, bytes_of(&types, member)))
                .collect();
            layouts.insert((*name).to_owned(), Layout { bytes: *bytes, members });
        }
    }
    layouts
}

/// The struct's name in C: `block_io_record` of `BlockIo`.
fn name_in_c(record: &str) -> String {
    let mut name = String::new();
    for letter in record.chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.extend(letter.to_lowercase());
    }
    if record == "Header" { name } else { name + "_record" }
}

macro_rules! layouts {
    ($($record:ident)*) => {
        HashMap::from([$({
            let members = record::$record::MEMBERS.iter();
            let members = members.map(|&(member, offset, bytes)| (member.to_owned(), offset, bytes)).collect();
            (name_in_c(stringify!($record)), Layout { bytes: size_of::<record::$record>(), members })
        }),*])
    };
}

/// Returns the layout of every record but `Histogram`, which only user space makes.
fn layouts_in_rust() -> HashMap<String, Layout> {
    layouts!(
        Header Exec Exit Oom Signal Cgroup Tcp Reclaim BlockIo RunQueue SignalDelivered ExecCommand Fork FileOpen
        SyscallError Dns LeftOut PacketDrop
    )
}

#[test]
fn records_have_the_same_layout_in_rust_and_c() {
    let (rust, c) = (layouts_in_rust(), layouts_in_c(is_record));
    for (name, layout) in &rust {
        assert_eq!(c.get(name), Some(layout), "struct {name} of record.h");
    }
    for name in c.keys() {
        assert!(rust.contains_key(name), "this test does not know struct {name} of record.h");
    }
}

#[test]
fn kinds_have_the_same_numbers_in_rust_and_c() {
    let header = include_str!("../bpf/include/record.h");
    let in_c: Vec<_> = header.lines().filter_map(|line| line.trim().strip_prefix("KIND_")).collect();
    let in_rust = RecordKind::ALL.map(|kind| format!("{} = {},", kind.name().to_uppercase(), kind as u16));
    assert_eq!(in_c, in_rust);
}

#[test]
fn no_record_has_padding_that_is_no_member() {
    for (name, layout) in layouts_in_c(is_record) {
        let mut end = 0;
        for (member, offset, bytes) in &layout.members {
            assert_eq!(*offset, end, "before {member} of {name}");
            end += bytes;
        }
        assert_eq!(end, layout.bytes, "at the end of {name}");
    }
}

fn is_in_a_map(name: &str) -> bool {
    ["histogram_sums", "block_key", "stall_key", "stall", "drop_key", "query_key", "query"].contains(&name)
}

/// What user space reads of maps by offset: `src/aggregate.rs` and `src/unanswered.rs`.
#[test]
fn map_keys_and_values_are_where_user_space_reads_them() {
    type Field = (&'static str, usize, usize);
    let expected: [(&str, usize, &[Field]); 7] = [
        ("histogram_sums", 144, &[("total_ns", 0, 8), ("max_ns", 8, 8), ("counts", 16, 128)]),
        ("block_key", 8, &[("device", 0, 4), ("operation", 4, 4)]),
        ("stall_key", 16, &[("cgroup_id", 0, 8), ("memcg", 8, 8)]),
        ("stall", 16, &[("ns", 0, 8), ("pages", 8, 8)]),
        ("drop_key", 16, &[("cgroup_id", 0, 8), ("reason", 8, 4), ("interface", 12, 4)]),
        ("query_key", 16, &[("socket_cookie", 0, 8), ("id", 8, 8)]),
        (
            "query",
            320,
            &[
                ("since_ns", 0, 8),
                ("cgroup_id", 8, 8),
                ("pid", 16, 4),
                ("tid", 20, 4),
                ("query_type", 24, 2),
                ("pad", 26, 6),
                ("question", 32, 288),
            ],
        ),
    ];
    let c = layouts_in_c(is_in_a_map);
    for (name, bytes, members) in expected {
        let members = members.iter().map(|&(member, offset, bytes)| (member.to_owned(), offset, bytes)).collect();
        assert_eq!(c.get(name), Some(&Layout { bytes, members }), "struct {name}");
    }
}
