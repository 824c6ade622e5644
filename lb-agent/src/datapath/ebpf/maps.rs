//! The maps from user space: typed handles, and one pin path for each.

use std::{
    borrow::BorrowMut,
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray},
};
use lb_common::{
    abi::{
        Addr4, Addr6, BackendValue, DeviceValue, FlowKey, FlowValue, FrontendKey, FrontendValue,
        LAYOUT_VERSION, NodeConfig, PeerValue, SourceRangeData, VipKey, VipValue,
    },
    hash,
    outcome::{Hook, METRICS_LEN, OUTCOMES_PER_HOOK, Outcome},
};
use tracing::warn;

use super::{foreign::ForeignMap, load::Generation, sizes::Capacity};
use crate::datapath::DatapathError;

/// A `bytemuck` type as aya wants it.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wire<T>(pub T);

// SAFETY: transparent over a type whose every bit pattern is a value.
unsafe impl<T: bytemuck::Pod> aya::Pod for Wire<T> {}

/// Every pinned map.
pub const PINNED: [&str; 22] = [
    "VIP_FILTER",
    "LB4_FRONTENDS",
    "LB6_FRONTENDS",
    "LB4_VIPS",
    "LB6_VIPS",
    "SLOTS",
    "LB4_BACKENDS",
    "LB6_BACKENDS",
    "LB4_FLOWS",
    "LB6_FLOWS",
    "LB4_FOREIGN",
    "LB6_FOREIGN",
    "AFFINITY",
    "LB4_SOURCE_RANGES",
    "LB6_SOURCE_RANGES",
    "NODE",
    "DEVICES",
    "METRICS",
    "SOCK_PEERS",
    "SOCK_CONNECTED",
    "SOCK_FLOWS",
    "TRACE",
];

/// Those of them that hold Services: they grow.
pub const OF_SERVICES: [&str; 9] = [
    "LB4_FRONTENDS",
    "LB6_FRONTENDS",
    "LB4_VIPS",
    "LB6_VIPS",
    "SLOTS",
    "LB4_BACKENDS",
    "LB6_BACKENDS",
    "LB4_SOURCE_RANGES",
    "LB6_SOURCE_RANGES",
];

/// Where everything of one node is pinned.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
}

impl Pins {
    /// Pins under `root`, in a directory of this layout version.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The directory of this layout version.
    pub fn dir(&self) -> PathBuf {
        self.root.join(format!("v{LAYOUT_VERSION}"))
    }

    /// A map's pin.
    pub fn map(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// The pin of a map that is to take the place of the one of its name, if there is such a thing.
    pub fn map_of(&self, name: &str, generation: Generation) -> PathBuf {
        match generation {
            Generation::Next if OF_SERVICES.contains(&name) => self.map(&format!("{name}_NEXT")),
            Generation::Next | Generation::Present => self.map(name),
        }
    }

    /// The next generation becomes the present one.
    pub fn promote_next(&self) -> Result<(), DatapathError> {
        OF_SERVICES.into_iter().try_for_each(|name| {
            let next = self.map_of(name, Generation::Next);
            fs::rename(&next, self.map(name)).map_err(|source| DatapathError::Kernel {
                operation: "rename the pin",
                object: next.display().to_string(),
                source: source.into(),
            })
        })
    }

    /// Removes what is left of a next generation that never became the present one.
    pub fn forget_next(&self) {
        for name in OF_SERVICES {
            // Mostly there is none.
            let _ = fs::remove_file(self.map_of(name, Generation::Next));
        }
    }

    /// The links' directory.
    pub fn links(&self) -> PathBuf {
        self.dir().join("links")
    }

    /// The directory of all versions.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes the directories.
    pub fn create(&self) -> Result<(), DatapathError> {
        fs::create_dir_all(self.links()).map_err(|source| DatapathError::Kernel {
            operation: "make the pin directory",
            object: format!("{} (is bpffs mounted there?)", self.links().display()),
            source: source.into(),
        })
    }
}

/// One family's maps.
pub struct FamilyMaps<A: 'static>
where
    Wire<FrontendKey<A>>: aya::Pod,
    Wire<VipKey<A>>: aya::Pod,
    Wire<BackendValue<A>>: aya::Pod,
    Wire<SourceRangeData<A>>: aya::Pod,
{
    /// Frontends.
    pub frontends: HashMap<MapData, Wire<FrontendKey<A>>, Wire<FrontendValue>>,
    /// Addresses with frontends.
    pub vips: HashMap<MapData, Wire<VipKey<A>>, Wire<VipValue>>,
    /// Backends by id.
    pub backends: Array<MapData, Wire<BackendValue<A>>>,
    /// Source ranges of load-balancer frontends.
    pub source_ranges: LpmTrie<MapData, Wire<SourceRangeData<A>>, u32>,
}

/// The maps the agent writes.
pub struct Maps {
    /// IPv4.
    pub v4: FamilyMaps<Addr4>,
    /// IPv6.
    pub v6: FamilyMaps<Addr6>,
    /// Backend ids.
    pub slots: Array<MapData, u32>,
    /// VIP filter words.
    pub filter: Array<MapData, u64>,
    capacity: Capacity,
}

fn map_at(pin: &Path, name: &str) -> Result<MapData, DatapathError> {
    MapData::from_pin(pin).map_err(|source| map_error("open pinned", name, source))
}

macro_rules! typed {
    ($open:expr, $name:expr, $kind:ident) => {
        Map::$kind($open($name)?).try_into().map_err(|source: MapError| map_error("open", $name, source))?
    };
}

macro_rules! open {
    ($pins:expr, $name:expr, $kind:ident) => {
        typed!(|name| map_at(&$pins.map(name), name), $name, $kind)
    };
}

impl Maps {
    /// Opens the pinned maps.
    pub fn open(pins: &Pins, generation: Generation) -> Result<Self, DatapathError> {
        let open = |name| map_at(&pins.map_of(name, generation), name);
        Ok(Self {
            v4: FamilyMaps {
                frontends: typed!(open, "LB4_FRONTENDS", HashMap),
                vips: typed!(open, "LB4_VIPS", HashMap),
                backends: typed!(open, "LB4_BACKENDS", Array),
                source_ranges: typed!(open, "LB4_SOURCE_RANGES", LpmTrie),
            },
            v6: FamilyMaps {
                frontends: typed!(open, "LB6_FRONTENDS", HashMap),
                vips: typed!(open, "LB6_VIPS", HashMap),
                backends: typed!(open, "LB6_BACKENDS", Array),
                source_ranges: typed!(open, "LB6_SOURCE_RANGES", LpmTrie),
            },
            slots: typed!(open, "SLOTS", Array),
            filter: typed!(open, "VIP_FILTER", Array),
            capacity: Capacity {
                slots: size_of_map(open, "SLOTS")?,
                backends: [size_of_map(open, "LB4_BACKENDS")?, size_of_map(open, "LB6_BACKENDS")?],
                frontends: [
                    size_of_map(open, "LB4_FRONTENDS")?.min(size_of_map(open, "LB4_VIPS")?),
                    size_of_map(open, "LB6_FRONTENDS")?.min(size_of_map(open, "LB6_VIPS")?),
                ],
                source_ranges: [
                    size_of_map(open, "LB4_SOURCE_RANGES")?,
                    size_of_map(open, "LB6_SOURCE_RANGES")?,
                ],
            },
        })
    }

    /// How much they hold.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }
}

/// Entries that a map has room for.
fn size_of_map(
    open: impl Fn(&'static str) -> Result<MapData, DatapathError>,
    name: &'static str,
) -> Result<u32, DatapathError> {
    let info = open(name)?.info().map_err(|source| map_error("ask about", name, source))?;
    Ok(info.max_entries())
}

/// Facts about the node, and its devices.
pub struct NodeMaps {
    node: Array<MapData, Wire<NodeConfig>>,
    devices: HashMap<MapData, u32, Wire<DeviceValue>>,
    filter: Array<MapData, u64>,
}

/// Setting a bit is a read and a write, and two threads do it.
static FILTER: Mutex<()> = Mutex::new(());

/// The bit of an address in the VIP filter.
pub fn filter_bit(addr: IpAddr) -> u32 {
    match addr {
        IpAddr::V4(addr) => hash::vip_filter_bit(&addr.octets()),
        IpAddr::V6(addr) => hash::vip_filter_bit(&addr.octets()),
    }
}

/// Sets the filter bit of an address: packets to it are looked at.
pub fn set_filter_bit(filter: &mut Array<MapData, u64>, addr: IpAddr) -> Result<(), DatapathError> {
    let _guard = FILTER.lock().unwrap_or_else(PoisonError::into_inner);
    let bit = filter_bit(addr);
    let error = |source| map_error("update", "VIP_FILTER", source);
    let word = filter.get(&(bit >> 6), 0).map_err(error)?;
    let with = word | 1 << (bit & 63);
    if with == word { Ok(()) } else { filter.set(bit >> 6, with, 0).map_err(error) }
}

impl NodeMaps {
    /// Opens the pinned maps.
    pub fn open(pins: &Pins) -> Result<Self, DatapathError> {
        Ok(Self {
            node: open!(pins, "NODE", Array),
            devices: open!(pins, "DEVICES", HashMap),
            filter: open!(pins, "VIP_FILTER", Array),
        })
    }

    /// The node's facts as the programs see them.
    pub fn node(&self) -> Result<NodeConfig, DatapathError> {
        self.node.get(&0, 0).map(|wire| wire.0).map_err(|source| map_error("read", "NODE", source))
    }

    /// Writes the node's facts. Replies to masqueraded flows come to its addresses: those are looked at.
    pub fn set_node(&mut self, node: NodeConfig) -> Result<(), DatapathError> {
        self.look_at(node.addr4, node.addr6)?;
        self.node.set(0, Wire(node), 0).map_err(|source| map_error("update", "NODE", source))
    }

    /// Writes the devices, and forgets all others. A device that is not there has no address, and XDP sends nothing to
    /// it: pods' have no entry.
    pub fn set_devices(&mut self, devices: &[(u32, DeviceValue)]) -> Result<(), DatapathError> {
        let matters = |(_, device): &&(u32, DeviceValue)| *device != DeviceValue::default();
        let wanted: BTreeMap<u32, DeviceValue> = devices.iter().filter(matters).copied().collect();
        let gone: Vec<u32> =
            self.devices.keys().filter_map(Result::ok).filter(|known| !wanted.contains_key(known)).collect();
        for ifindex in gone {
            let _ = self.devices.remove(&ifindex);
        }
        let mut without_place = 0;
        for (ifindex, device) in wanted {
            self.look_at(device.addr4, device.addr6)?;
            match self.devices.insert(ifindex, Wire(device), 0) {
                Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::E2BIG) => {
                    without_place += 1;
                }
                written => written.map_err(|source| map_error("update", "DEVICES", source))?,
            }
        }
        if without_place > 0 {
            warn!(
                devices = without_place,
                "DEVICES is full: flows out of them are masqueraded to the node's main address"
            );
        }
        Ok(())
    }

    fn look_at(&mut self, addr4: Addr4, addr6: Addr6) -> Result<(), DatapathError> {
        for addr in [IpAddr::from(addr4), IpAddr::from(addr6)] {
            if !addr.is_unspecified() {
                set_filter_bit(&mut self.filter, addr)?;
            }
        }
        Ok(())
    }
}

/// The flows of one family, by pin: they change under us.
pub type Flows<A> = HashMap<MapData, Wire<FlowKey<A>>, Wire<FlowValue<A>>>;

/// Opens the flow tables.
pub fn open_flows(pins: &Pins) -> Result<(Flows<Addr4>, Flows<Addr6>), DatapathError> {
    Ok((open!(pins, "LB4_FLOWS", LruHashMap), open!(pins, "LB6_FLOWS", LruHashMap)))
}

/// UDP sockets by their cookie.
pub type Connected = HashMap<MapData, u64, Wire<PeerValue>>;

/// Opens the table of connected UDP sockets.
pub fn open_connected(pins: &Pins) -> Result<Connected, DatapathError> {
    Ok(open!(pins, "SOCK_CONNECTED", LruHashMap))
}

/// Opens the tables of netfilter's flows.
pub fn open_foreign(pins: &Pins) -> Result<(ForeignMap<Addr4>, ForeignMap<Addr6>), DatapathError> {
    Ok((open!(pins, "LB4_FOREIGN", HashMap), open!(pins, "LB6_FOREIGN", HashMap)))
}

/// Every counter that isn't zero, summed over CPUs.
pub fn metrics(pins: &Pins) -> Result<Vec<(Hook, Outcome, u64)>, DatapathError> {
    let counters: PerCpuArray<MapData, u64> = open!(pins, "METRICS", PerCpuArray);
    let mut sums = Vec::new();
    for hook in Hook::ALL {
        for outcome in Outcome::ALL {
            let index = *hook as u32 * OUTCOMES_PER_HOOK + *outcome as u32;
            debug_assert!(index < METRICS_LEN);
            let values = counters.get(&index, 0).map_err(|source| map_error("read", "METRICS", source))?;
            let sum: u64 = values.iter().sum();
            if sum > 0 {
                sums.push((*hook, *outcome, sum));
            }
        }
    }
    Ok(sums)
}

/// Sets a single-entry array of a loaded object.
pub fn set_first<T: bytemuck::Pod>(ebpf: &mut Ebpf, name: &str, value: T) -> Result<(), DatapathError> {
    let Some(map) = ebpf.map_mut(name) else { return Ok(()) };
    let mut array: Array<_, Wire<T>> =
        Array::try_from(map.borrow_mut()).map_err(|source| map_error("open", name, source))?;
    array.set(0, Wire(value), 0).map_err(|source| map_error("update", name, source))
}

/// An aya map error as ours.
pub fn map_error(operation: &'static str, map: &str, source: MapError) -> DatapathError {
    let source = match source {
        MapError::SyscallError(error) => error.io_error,
        MapError::OutOfBounds { index, max_entries } => {
            io::Error::other(format!("index {index} is beyond its {max_entries} entries"))
        }
        other => io::Error::other(other),
    };
    DatapathError::Map { operation, map: map.to_owned(), source }
}

/// An address of one family, or nothing.
pub trait WireAddr: Copy + Ord {
    /// From an address.
    fn from_ip(addr: IpAddr) -> Option<Self>;
    /// To an address.
    fn to_ip(self) -> IpAddr;
}

impl WireAddr for Addr4 {
    fn from_ip(addr: IpAddr) -> Option<Self> {
        match addr {
            IpAddr::V4(addr) => Some(addr.octets()),
            IpAddr::V6(_) => None,
        }
    }
    fn to_ip(self) -> IpAddr {
        IpAddr::from(self)
    }
}

impl WireAddr for Addr6 {
    fn from_ip(addr: IpAddr) -> Option<Self> {
        match addr {
            IpAddr::V6(addr) => Some(addr.octets()),
            IpAddr::V4(_) => None,
        }
    }
    fn to_ip(self) -> IpAddr {
        IpAddr::from(self)
    }
}
