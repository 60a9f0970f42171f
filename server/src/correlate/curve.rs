//! What a container's use over the last minutes looks like: a leak, a spike, or page cache.
//!
//! In: the points of a curve. Out: a [`Shape`]. What must hold: memory that the kernel frees by itself (page cache) is no leak; a
//! name is given only to what is clear, anything else is `unclear`.

use tapio_wire::event::ArchivedCurve;

/// Points of which less says nothing.
const POINTS_MIN: usize = 6;
/// A leak takes its time: five minutes, with the interval that is configured by default. What fills its caches at its start is none.
const LEAK_POINTS_MIN: usize = 30;
/// A leak grows by at least this share of the limit, or of its largest, over the curve.
const LEAK_GROWTH_MIN: f64 = 0.2;
/// How well a straight line must explain it: the coefficient of determination.
const LEAK_FIT_MIN: f64 = 0.8;
/// A spike brings at least this share of all growth within the last points.
const SPIKE_SHARE_MIN: f64 = 0.5;
const SPIKE_POINTS: usize = 3;
/// Page cache and tmpfs are what it is about from this share of the use on.
const MOSTLY: f64 = 0.5;

/// What a curve looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Grows steadily.
    Leak,
    /// Grew at once at the end.
    Spike,
    /// Mostly page cache, which the kernel frees by itself.
    Cache,
    /// Mostly tmpfs or shared memory.
    Tmpfs,
    /// Neither grew nor shrank.
    Steady,
    /// Too short, or none of these.
    Unclear,
}

impl Shape {
    /// Every shape.
    pub const ALL: [Self; 6] = [Self::Leak, Self::Spike, Self::Cache, Self::Tmpfs, Self::Steady, Self::Unclear];

    /// Name in patterns.
    pub fn name(self) -> &'static str {
        match self {
            Self::Leak => "leak",
            Self::Spike => "spike",
            Self::Cache => "cache",
            Self::Tmpfs => "tmpfs",
            Self::Steady => "steady",
            Self::Unclear => "unclear",
        }
    }
}

/// What a curve says in a few figures.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    pub shape: Shape,
    pub first_bytes: u64,
    pub last_bytes: u64,
    pub peak_bytes: u64,
    /// Bytes an hour of what is not page cache, by the method of least squares; 0 where it shrinks.
    pub growth_per_hour: u64,
    pub lasted_ns: u64,
    /// CPU use of the last minute, thousandths of a core.
    pub cpu_milli: u64,
    /// Share of the last minute's periods in which it was throttled, percent.
    pub throttled: u64,
}

const KIB: f64 = 1024.0;
const HOUR_NS: f64 = 3.6e12;
const LAST_MINUTE: usize = 6;

/// Describes the curve; [`None`] if it is empty.
pub fn summary(curve: &ArchivedCurve) -> Option<Summary> {
    let points = curve.points.as_slice();
    let (first, last) = (points.first()?, points.last()?);
    let bytes = |kib: u32| u64::from(kib) << 10;
    let memory: Vec<f64> = points.iter().map(|point| f64::from(point.memory_kib.to_native()) * KIB).collect();
    // What does not go by itself when memory runs short.
    let held: Vec<f64> = points
        .iter()
        .zip(&memory)
        .map(|(point, memory)| memory * (1.0 - f64::from(point.file_share) / 255.0))
        .collect();
    let interval_ns = curve.interval_ns.to_native();
    let (slope, fit) = line(&held);
    let limit = match curve.limit_bytes.to_native() {
        u64::MAX | 0 => memory.iter().copied().fold(1.0, f64::max),
        limit => limit as f64,
    };
    let growth = held.last()? - held.first()?;
    let recent = held.len().saturating_sub(SPIKE_POINTS + 1);
    let recent_growth = held.last()? - held[recent];
    let share = |of: u8| f64::from(of) / 255.0;
    let shape = if share(last.file_share) >= MOSTLY {
        Shape::Cache
    } else if share(last.shmem_share) >= MOSTLY {
        Shape::Tmpfs
    } else if points.len() < POINTS_MIN {
        Shape::Unclear
    } else if points.len() >= LEAK_POINTS_MIN && growth >= LEAK_GROWTH_MIN * limit && fit >= LEAK_FIT_MIN {
        Shape::Leak
    } else if recent_growth >= LEAK_GROWTH_MIN * limit && recent_growth >= SPIKE_SHARE_MIN * growth {
        Shape::Spike
    } else if growth.abs() < 0.05 * limit {
        Shape::Steady
    } else {
        Shape::Unclear
    };
    let minute = &points[points.len().saturating_sub(LAST_MINUTE)..];
    let mean = |sum: u64| sum / minute.len().max(1) as u64;
    Some(Summary {
        shape,
        first_bytes: bytes(first.memory_kib.to_native()),
        last_bytes: bytes(last.memory_kib.to_native()),
        peak_bytes: points.iter().map(|point| bytes(point.memory_kib.to_native())).max()?,
        growth_per_hour: (slope / interval_ns.max(1) as f64 * HOUR_NS).max(0.0) as u64,
        lasted_ns: interval_ns * (points.len() as u64 - 1),
        cpu_milli: mean(minute.iter().map(|point| u64::from(point.cpu_milli.to_native())).sum()),
        throttled: mean(minute.iter().map(|point| u64::from(point.throttled)).sum()),
    })
}

/// Slope of a step and coefficient of determination of the line through values at equal distances, by least squares.
fn line(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let (mean_x, mean_y) = ((count - 1.0) / 2.0, values.iter().sum::<f64>() / count);
    let (mut xy, mut xx, mut yy) = (0.0, 0.0, 0.0);
    for (x, y) in values.iter().enumerate() {
        let (x, y) = (x as f64 - mean_x, y - mean_y);
        xy += x * y;
        xx += x * x;
        yy += y * y;
    }
    if xx == 0.0 || yy == 0.0 {
        return (0.0, 0.0);
    }
    (xy / xx, xy * xy / (xx * yy))
}

#[cfg(test)]
mod tests {
    use tapio_wire::event::{Curve, Point};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn of(limit_mib: u64, points: &[(u64, u8, u8)]) -> Summary {
        let points = points.iter().map(|&(mib, file_share, shmem_share)| Point {
            memory_kib: (mib * 1024) as u32,
            file_share,
            shmem_share,
            ..Point::default()
        });
        let curve =
            Curve { cgroup: 0, limit_bytes: limit_mib * MIB, interval_ns: 10_000_000_000, points: points.collect() };
        let bytes = rkyv::to_bytes::<rkyv::rancor::Error>(&curve).expect("archived");
        let archived = rkyv::access::<ArchivedCurve, rkyv::rancor::Error>(&bytes).expect("sound");
        summary(archived).expect("it has points")
    }

    #[test]
    fn a_leak_a_spike_page_cache_and_tmpfs_are_distinguished() {
        let leak: Vec<_> = (0..180).map(|at| (10 + at / 2 + at % 2, 5, 0)).collect();
        let found = of(100, &leak);
        assert_eq!(found.shape, Shape::Leak);
        // A MiB in 20 s is 180 an hour.
        assert!((170..190).contains(&(found.growth_per_hour / MIB)), "{found:?}");
        assert_eq!(found.lasted_ns, 1_790_000_000_000);

        let mut spike = vec![(20, 5, 0); 100];
        spike.extend([(40, 5, 0), (95, 5, 0)]);
        assert_eq!(of(100, &spike).shape, Shape::Spike);
        let warm_up: Vec<_> = (0..8).map(|at| (10 + 11 * at, 5, 0)).collect();
        assert_ne!(of(100, &warm_up).shape, Shape::Leak, "a minute is no time for a leak");
        assert_eq!(of(100, &[(99, 200, 0); 20]).shape, Shape::Cache);
        assert_eq!(of(100, &[(99, 10, 220); 20]).shape, Shape::Tmpfs);
        assert_eq!(of(100, &[(40, 5, 0); 20]).shape, Shape::Steady);
        assert_eq!(of(100, &[(1, 0, 0), (90, 0, 0)]).shape, Shape::Unclear, "two points say nothing");
        let cache_grows: Vec<_> = (0..100).map(|at| (10 + at, (255 * at / 110) as u8, 0)).collect();
        assert_ne!(of(100, &cache_grows).shape, Shape::Leak, "what grows is page cache");
    }
}
