//! How large the maps are: what a cluster and a node need. Pure.

use std::fmt;

use lb_core::{model::Family, table::ServiceTable};

/// Places in the maps that hold Services. Pairs are for IPv4 and IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Places in `SLOTS`.
    pub slots: u32,
    /// Ids in `LB4_BACKENDS` and `LB6_BACKENDS`, 0 included.
    pub backends: [u32; 2],
    /// Entries in `LB4_FRONTENDS` and `LB6_FRONTENDS`, and in `LB4_VIPS` and `LB6_VIPS`.
    pub frontends: [u32; 2],
    /// Entries in `LB4_SOURCE_RANGES` and `LB6_SOURCE_RANGES`. The kernel takes memory for those only that are there.
    pub source_ranges: [u32; 2],
}

/// A map without room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Full {
    /// No run of this many slots is free.
    Slots(u32),
    /// All backend ids are taken.
    Backends(Family),
    /// All frontends, or their addresses.
    Frontends(Family),
    /// All source ranges.
    SourceRanges(Family),
}

/// Position of a family in pairs.
pub fn index(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

impl Capacity {
    /// Maps as they are made: enough for 1 500 Services with ten endpoints each, in 4 MiB.
    pub const LEAST: Self = Self {
        slots: 1 << 16,
        backends: [1 << 14, 1 << 13],
        frontends: [1 << 13, 1 << 12],
        source_ranges: [1 << 20; 2],
    };

    /// Maps that are never full, on paper.
    pub const UNLIMITED: Self = Self {
        slots: u32::MAX,
        backends: [u32::MAX; 2],
        frontends: [u32::MAX; 2],
        source_ranges: [u32::MAX; 2],
    };

    /// Every map with at most so many entries.
    pub fn at_most(self, entries: u32) -> Self {
        self.each(Self::all(entries), u32::min)
    }

    /// The larger of each map.
    pub fn or_larger(self, other: Self) -> Self {
        self.each(other, u32::max)
    }

    /// What `table` takes.
    pub fn needed(table: &ServiceTable) -> Self {
        let mut needed = Self::all(0);
        let add = |places: &mut u32, more: usize| {
            *places = places.saturating_add(u32::try_from(more).unwrap_or(u32::MAX));
        };
        for (id, entry) in &table.services {
            add(&mut needed.slots, entry.cluster.len() + entry.local.len());
            add(&mut needed.backends[index(id.family)], entry.serving.len());
        }
        for (addr, frontend) in &table.frontends {
            let family = index(Family::of(addr.addr));
            add(&mut needed.frontends[family], 1);
            add(&mut needed.source_ranges[family], frontend.source_ranges.len());
        }
        needed
    }

    /// Room for `table` and as much again: changed backends take other slots before the old ones are free.
    pub fn comfortable(table: &ServiceTable) -> Self {
        let needed = Self::needed(table);
        Self::LEAST.or_larger(needed.each(needed, |needed, _| power_of_two(needed.saturating_mul(2))))
    }

    /// Whether all of `needed` has a place.
    pub fn holds(self, needed: Self) -> bool {
        self.or_larger(needed) == self
    }

    /// At least twice the room where there is none.
    pub fn with_room(self, full: &[Full]) -> Self {
        let mut larger = self;
        for full in full {
            let (places, before, wanted) = match full {
                Full::Slots(run) => (&mut larger.slots, self.slots, *run),
                Full::Backends(family) => {
                    (&mut larger.backends[index(*family)], self.backends[index(*family)], 0)
                }
                Full::Frontends(family) => {
                    (&mut larger.frontends[index(*family)], self.frontends[index(*family)], 0)
                }
                Full::SourceRanges(family) => {
                    (&mut larger.source_ranges[index(*family)], self.source_ranges[index(*family)], 0)
                }
            };
            *places = (*places).max(power_of_two(before.saturating_add(before.max(wanted))));
        }
        larger
    }

    fn all(entries: u32) -> Self {
        Self { slots: entries, backends: [entries; 2], frontends: [entries; 2], source_ranges: [entries; 2] }
    }

    fn each(self, other: Self, of: impl Fn(u32, u32) -> u32) -> Self {
        let pair = |a: [u32; 2], b: [u32; 2]| [of(a[0], b[0]), of(a[1], b[1])];
        Self {
            slots: of(self.slots, other.slots),
            backends: pair(self.backends, other.backends),
            frontends: pair(self.frontends, other.frontends),
            source_ranges: pair(self.source_ranges, other.source_ranges),
        }
    }
}

fn power_of_two(least: u32) -> u32 {
    least.checked_next_power_of_two().unwrap_or(u32::MAX)
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slots(run) => write!(f, "SLOTS has no {run} free places in a row"),
            Self::Backends(family) => write!(f, "LB{}_BACKENDS is full", digit(*family)),
            Self::Frontends(family) => write!(f, "LB{}_FRONTENDS is full", digit(*family)),
            Self::SourceRanges(family) => write!(f, "LB{}_SOURCE_RANGES is full", digit(*family)),
        }
    }
}

fn digit(family: Family) -> u8 {
    match family {
        Family::V4 => 4,
        Family::V6 => 6,
    }
}

/// Entries in each of the two flow tables, on a node with so many CPUs and bytes of memory: two for each connection that
/// kube-proxy would let conntrack have (`conntrack.min` and `conntrack.maxPerCore` as they are if not given), as long as
/// both tables, whose memory is taken at once, stay below 1/256 of the node's.
pub fn flows(cpus: u32, memory: u64) -> u32 {
    let connections = CONNECTIONS_MIN.max(cpus.saturating_mul(CONNECTIONS_PER_CPU));
    let affordable = u32::try_from(memory / 256 / FLOW_BYTES).unwrap_or(u32::MAX).max(FLOWS_MIN);
    let entries = connections.saturating_mul(2).min(affordable);
    1 << entries.ilog2()
}

/// kube-proxy `cmd/kube-proxy/app`, `conntrack.min` and `conntrack.maxPerCore`.
const CONNECTIONS_MIN: u32 = 131_072;
const CONNECTIONS_PER_CPU: u32 = 32_768;
/// However little memory there is.
const FLOWS_MIN: u32 = 32_768;
/// An entry in each of both tables, as `bpftool map show` tells their memory.
const FLOW_BYTES: u64 = 336;

#[cfg(test)]
mod tests {
    use lb_core::{
        compile::{CompileConfig, Compiler, NodeView},
        synthetic,
    };

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn flow_tables_follow_cpus_and_memory() {
        for (cpus, memory, entries) in [
            (2, GIB, 32_768),
            (2, 8 * GIB, 65_536),
            (2, 32 * GIB, 262_144),
            (8, 64 * GIB, 524_288),
            (64, 512 * GIB, 4_194_304),
        ] {
            assert_eq!(flows(cpus, memory), entries, "{cpus} CPUs, {} GiB", memory / GIB);
        }
    }

    #[test]
    fn a_cluster_fits_twice() {
        let mut compiler = Compiler::new(CompileConfig::default(), NodeView::default());
        synthetic::cluster(5_000, 5).for_each(|event| compiler.apply(event));
        compiler.compile();
        let needed = Capacity::needed(compiler.table());
        assert_eq!((needed.frontends, needed.backends, needed.slots), ([5_000, 0], [25_000, 0], 25_000));
        let room = Capacity::comfortable(compiler.table());
        let least = Capacity::LEAST;
        assert_eq!(
            (room.frontends, room.backends),
            ([16_384, least.frontends[1]], [65_536, least.backends[1]])
        );
        assert!(room.holds(needed) && !least.holds(needed));
        assert!(!room.at_most(10_000).holds(needed));
    }

    #[test]
    fn what_is_full_grows_and_nothing_else() {
        let least = Capacity::LEAST;
        let more = least.with_room(&[Full::Frontends(Family::V6), Full::Frontends(Family::V6)]);
        assert_eq!(more, Capacity { frontends: [least.frontends[0], 2 * least.frontends[1]], ..least });
        let more = least.with_room(&[Full::Slots(1), Full::Slots(100_000)]);
        assert_eq!(more, Capacity { slots: 262_144, ..least });
    }
}
