//! The rings: their sizes, and one for each CPU in the bulk lane.

use aya::Ebpf;
use aya::maps::{ArrayOfMaps, MapData};

use super::error::{Error, object_error};
use crate::object::{BULK, BULK_TEMPLATE_BYTES};

/// Rings may not be larger: the kernel's own limit is near 2 GiB, and more would never be meant.
pub(super) const RING_BYTES_MAX: u32 = 1 << 30;

/// A ring is a power of two of pages: the next one that holds `bytes`.
pub(super) fn ring_bytes(bytes: u32) -> Result<u32, Error> {
    if bytes == 0 || bytes > RING_BYTES_MAX {
        return Err(Error::RingSize { bytes });
    }
    let page = u32::try_from(rustix::param::page_size()).unwrap_or(RING_BYTES_MAX);
    Ok(bytes.max(page).next_power_of_two())
}

/// Makes a ring for each CPU and puts it where the programs look for it. The outer map may go: the programs hold it.
pub(super) fn make_bulk_rings(object: &mut Ebpf, bytes: u32) -> Result<(Vec<MapData>, u32), Error> {
    let outer = object.map_mut(BULK).unwrap_or_else(|| unreachable!("the object has no map {BULK}"));
    let mut outer: ArrayOfMaps<_> = ArrayOfMaps::try_from(outer).map_err(|error| object_error(error.into()))?;
    let mut rings = Vec::new();
    let mut bytes = bytes;
    for cpu in 0..outer.len() {
        let mut ring = bulk_ring(bytes)?;
        let mut put = outer.set(cpu, &ring, 0);
        if put.is_err() && cpu == 0 && bytes != BULK_TEMPLATE_BYTES {
            // Before 5.10 a map inside another must have the template's size.
            bytes = BULK_TEMPLATE_BYTES;
            ring = bulk_ring(bytes)?;
            put = outer.set(cpu, &ring, 0);
        }
        put.map_err(|error| object_error(error.into()))?;
        rings.push(ring);
    }
    Ok((rings, bytes))
}

fn bulk_ring(bytes: u32) -> Result<MapData, Error> {
    let kind = aya_obj::generated::bpf_map_type::BPF_MAP_TYPE_RINGBUF as u32;
    let ring = aya_obj::Map::new_from_params(kind, 0, 0, bytes, 0);
    MapData::create(ring, "bulk_ring", None).map_err(|error| object_error(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_sizes_are_rounded_up_to_powers_of_two() {
        let page = u32::try_from(rustix::param::page_size()).unwrap();
        assert_eq!(ring_bytes(1).unwrap(), page);
        assert_eq!(ring_bytes(page + 1).unwrap(), page * 2);
        assert!(matches!(ring_bytes(0), Err(Error::RingSize { bytes: 0 })));
        assert!(ring_bytes(u32::MAX).is_err());
    }
}
