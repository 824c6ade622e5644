//! What differs between IPv4 and IPv6: header layout, maps, FIB arguments. Everything else is written once.

use aya_ebpf::{bindings::bpf_fib_lookup, btf_maps::lpm_trie::Key};
use lb_common::{
    abi::{
        AffinityKey, BackendValue, DeviceValue, FlowKey, FlowValue, FrontendKey, FrontendValue, NodeConfig,
        SourceRangeData, VipKey, VipValue,
    },
    hash,
    net::{ETH_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, PROTO_ICMP, PROTO_ICMPV6},
};

use crate::{maps, maps::Scratch};

/// One IP family, as a type that is never made.
pub trait Family: 'static {
    /// Address: native-endian words in network order. Maps declare bytes, which bpftool shows as such; the layout is
    /// the same.
    type Addr: Copy + PartialEq + AsRef<[u32]>;
    /// Both addresses as they lie side by side in the header.
    type Pair: Copy;

    /// EtherType, host order.
    const ETHERTYPE: u16;
    /// Offset of the source address in the frame; the destination follows it.
    const SADDR_OFFSET: usize;
    /// Offset of TTL / hop limit in the frame.
    const TTL_OFFSET: usize;
    /// Offset of the header checksum in the frame, if the family has one.
    const IP_CSUM_OFFSET: Option<usize>;
    /// Bits of an address.
    const ADDR_BITS: u32;
    /// Length of a header without options, bytes.
    const HEADER_LEN: usize;
    /// ICMP's protocol number.
    const ICMP: u8;
    /// No address.
    const UNSPECIFIED: Self::Addr;

    /// Source and destination side by side.
    fn pair(saddr: Self::Addr, daddr: Self::Addr) -> Self::Pair;
    /// The address as a log shows it.
    #[cfg(feature = "trace")]
    type Shown: aya_log_ebpf::macro_support::IpFormatter + aya_log_ebpf::macro_support::Argument;
    /// The address as a log shows it.
    #[cfg(feature = "trace")]
    fn shown(addr: &Self::Addr) -> Self::Shown;
    /// The address in sixteen bytes, IPv4-mapped if IPv4.
    #[cfg(feature = "trace")]
    fn shown16(addr: &Self::Addr) -> [u8; 16];
    /// All zero: no address.
    fn is_unspecified(addr: &Self::Addr) -> bool;

    /// Looks a frontend up.
    fn frontend(key: &FrontendKey<Self::Addr>) -> Option<&'static FrontendValue>;
    /// Looks an address with frontends up.
    fn vip(key: &VipKey<Self::Addr>) -> Option<&'static VipValue>;
    /// Looks a backend up by id.
    fn backend(id: u32) -> Option<&'static BackendValue<Self::Addr>>;
    /// Looks a flow up; the entry may be recycled by the kernel at any time, so only its own fields may be written.
    fn flow(key: &FlowKey<Self::Addr>) -> Option<&'static mut FlowValue<Self::Addr>>;
    /// Inserts a flow, `BPF_ANY` or `BPF_NOEXIST`.
    fn insert_flow(key: &FlowKey<Self::Addr>, value: &FlowValue<Self::Addr>, flags: u64) -> Result<(), i32>;
    /// Removes a flow.
    fn remove_flow(key: &FlowKey<Self::Addr>);
    /// Are these packets of a connection that netfilter translates?
    fn is_foreign(key: &FlowKey<Self::Addr>) -> bool;
    /// This CPU's scratch space. To be taken at most once at a time.
    fn scratch() -> Option<&'static mut Scratch<Self::Addr>>;
    /// Is this source allowed to use the service's load-balancer addresses?
    fn source_allowed(service_id: u32, addr: Self::Addr) -> bool;

    /// The affinity key of a client address.
    fn affinity_key(client: Self::Addr, service_id: u32) -> AffinityKey;
    /// The node's own address to masquerade to.
    fn node_addr(node: &NodeConfig) -> &Self::Addr;
    /// A device's own address to masquerade to.
    fn device_addr(device: &DeviceValue) -> &Self::Addr;
    /// Writes family and addresses into a FIB question.
    fn fib_question(params: &mut bpf_fib_lookup, saddr: &Self::Addr, daddr: &Self::Addr);
    /// A 32-bit hash of source address, ports and protocol: spreads flows over slots and source ports.
    fn hash(saddr: &Self::Addr, daddr: &Self::Addr, ports: u32, proto: u8) -> u32;
}

/// An IPv4 address.
pub type Words4 = [u32; 1];
/// An IPv6 address.
pub type Words6 = [u32; 4];

/// IPv4.
pub enum V4 {}
/// IPv6.
pub enum V6 {}

macro_rules! map_accessors {
    ($frontends:ident, $vips:ident, $backends:ident, $flows:ident, $foreign:ident, $ranges:ident, $scratch:ident) => {
        #[inline(always)]
        fn frontend(key: &FrontendKey<Self::Addr>) -> Option<&'static FrontendValue> {
            // SAFETY: the agent replaces values as a whole and never deletes a frontend in use without the
            // kernel's RCU grace period.
            unsafe { maps::$frontends.get(same_layout(key)) }
        }
        #[inline(always)]
        fn vip(key: &VipKey<Self::Addr>) -> Option<&'static VipValue> {
            // SAFETY: as for frontends.
            unsafe { maps::$vips.get(same_layout(key)) }
        }
        #[inline(always)]
        fn backend(id: u32) -> Option<&'static BackendValue<Self::Addr>> {
            // SAFETY: words for bytes.
            maps::$backends.get(id).map(|backend| unsafe { same_layout(backend) })
        }
        #[inline(always)]
        fn flow(key: &FlowKey<Self::Addr>) -> Option<&'static mut FlowValue<Self::Addr>> {
            // SAFETY: entries are plain integers; two CPUs may write state bits at once and lose one, which the
            // next packet sets again.
            unsafe { maps::$flows.get_ptr_mut(same_layout(key)).map(|entry| &mut *entry.cast()) }
        }
        #[inline(always)]
        fn insert_flow(
            key: &FlowKey<Self::Addr>,
            value: &FlowValue<Self::Addr>,
            flags: u64,
        ) -> Result<(), i32> {
            // SAFETY: words for bytes.
            unsafe { maps::$flows.insert(same_layout(key), same_layout(value), flags) }
        }
        #[inline(always)]
        fn remove_flow(key: &FlowKey<Self::Addr>) {
            // SAFETY: words for bytes.
            let _ = unsafe { maps::$flows.remove(same_layout(key)) };
        }
        #[inline(always)]
        fn is_foreign(key: &FlowKey<Self::Addr>) -> bool {
            // SAFETY: words for bytes; only its being there counts.
            unsafe { maps::$foreign.get(same_layout(key)) }.is_some()
        }
        #[inline(always)]
        fn scratch() -> Option<&'static mut Scratch<Self::Addr>> {
            // SAFETY: a per-CPU slot, words for bytes; these programs run with softirqs off, so none interrupts
            // another.
            maps::$scratch.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch.cast() })
        }
        #[inline(always)]
        fn source_allowed(service_id: u32, addr: Self::Addr) -> bool {
            let data = SourceRangeData { service_id, addr };
            // SAFETY: words for bytes.
            let key = Key { prefix_len: 32 + Self::ADDR_BITS, data: *unsafe { same_layout(&data) } };
            maps::$ranges.get(&key).is_some()
        }
    };
}

impl Family for V4 {
    type Addr = Words4;
    type Pair = [Words4; 2];

    const ETHERTYPE: u16 = ETHERTYPE_IPV4;
    const SADDR_OFFSET: usize = ETH_LEN + 12;
    const TTL_OFFSET: usize = ETH_LEN + 8;
    const IP_CSUM_OFFSET: Option<usize> = Some(ETH_LEN + 10);
    const ADDR_BITS: u32 = 32;
    const HEADER_LEN: usize = 20;
    const ICMP: u8 = PROTO_ICMP;
    const UNSPECIFIED: Words4 = [0; 1];

    map_accessors!(
        LB4_FRONTENDS,
        LB4_VIPS,
        LB4_BACKENDS,
        LB4_FLOWS,
        LB4_FOREIGN,
        LB4_SOURCE_RANGES,
        LB4_SCRATCH
    );

    #[inline(always)]
    fn pair(saddr: Words4, daddr: Words4) -> Self::Pair {
        [saddr, daddr]
    }
    #[cfg(feature = "trace")]
    type Shown = [u8; 4];
    #[cfg(feature = "trace")]
    #[inline(always)]
    fn shown(addr: &Words4) -> [u8; 4] {
        addr[0].to_ne_bytes()
    }
    #[cfg(feature = "trace")]
    #[inline(always)]
    fn shown16(addr: &Words4) -> [u8; 16] {
        let [a, b, c, d] = addr[0].to_ne_bytes();
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
    }
    #[inline(always)]
    fn is_unspecified(addr: &Words4) -> bool {
        addr[0] == 0
    }
    #[inline(always)]
    fn affinity_key(client: Words4, service_id: u32) -> AffinityKey {
        AffinityKey::v4(client[0].to_ne_bytes(), service_id)
    }
    #[inline(always)]
    fn node_addr(node: &NodeConfig) -> &Words4 {
        // SAFETY: words for bytes; the field is aligned by four.
        unsafe { same_layout(&node.addr4) }
    }
    #[inline(always)]
    fn device_addr(device: &DeviceValue) -> &Words4 {
        // SAFETY: words for bytes; the field is aligned by four.
        unsafe { same_layout(&device.addr4) }
    }
    #[inline(always)]
    fn fib_question(params: &mut bpf_fib_lookup, saddr: &Words4, daddr: &Words4) {
        params.family = 2;
        params.__bindgen_anon_3.ipv4_src = saddr[0];
        params.__bindgen_anon_4.ipv4_dst = daddr[0];
    }
    #[inline(always)]
    fn hash(saddr: &Words4, daddr: &Words4, ports: u32, proto: u8) -> u32 {
        let low = u64::from(saddr[0]) << 32 | u64::from(ports);
        let high = u64::from(daddr[0]) << 8 | u64::from(proto);
        hash::mix64(low ^ high.rotate_left(17)) as u32
    }
}

impl Family for V6 {
    type Addr = Words6;
    type Pair = [Words6; 2];

    const ETHERTYPE: u16 = ETHERTYPE_IPV6;
    const SADDR_OFFSET: usize = ETH_LEN + 8;
    const TTL_OFFSET: usize = ETH_LEN + 7;
    const IP_CSUM_OFFSET: Option<usize> = None;
    const ADDR_BITS: u32 = 128;
    const HEADER_LEN: usize = 40;
    const ICMP: u8 = PROTO_ICMPV6;
    const UNSPECIFIED: Words6 = [0; 4];

    map_accessors!(
        LB6_FRONTENDS,
        LB6_VIPS,
        LB6_BACKENDS,
        LB6_FLOWS,
        LB6_FOREIGN,
        LB6_SOURCE_RANGES,
        LB6_SCRATCH
    );

    #[inline(always)]
    fn pair(saddr: Words6, daddr: Words6) -> Self::Pair {
        [saddr, daddr]
    }
    #[cfg(feature = "trace")]
    type Shown = [u8; 16];
    #[cfg(feature = "trace")]
    #[inline(always)]
    fn shown(addr: &Words6) -> [u8; 16] {
        // SAFETY: words for bytes.
        unsafe { *same_layout(addr) }
    }
    #[cfg(feature = "trace")]
    #[inline(always)]
    fn shown16(addr: &Words6) -> [u8; 16] {
        Self::shown(addr)
    }
    #[inline(always)]
    fn is_unspecified(addr: &Words6) -> bool {
        addr[0] | addr[1] | addr[2] | addr[3] == 0
    }
    #[inline(always)]
    fn affinity_key(client: Words6, service_id: u32) -> AffinityKey {
        // SAFETY: words for bytes.
        AffinityKey::v6(unsafe { *same_layout(&client) }, service_id)
    }
    #[inline(always)]
    fn node_addr(node: &NodeConfig) -> &Words6 {
        // SAFETY: words for bytes; the field is aligned by four.
        unsafe { same_layout(&node.addr6) }
    }
    #[inline(always)]
    fn device_addr(device: &DeviceValue) -> &Words6 {
        // SAFETY: words for bytes; the field is aligned by four.
        unsafe { same_layout(&device.addr6) }
    }
    #[inline(always)]
    fn fib_question(params: &mut bpf_fib_lookup, saddr: &Words6, daddr: &Words6) {
        params.family = 10;
        params.__bindgen_anon_3.ipv6_src = *saddr;
        params.__bindgen_anon_4.ipv6_dst = *daddr;
    }
    #[inline(always)]
    fn hash(saddr: &Words6, daddr: &Words6, ports: u32, proto: u8) -> u32 {
        let [s0, s1, s2, s3] = *saddr;
        let [d0, d1, d2, d3] = *daddr;
        let source =
            hash::mix64(u64::from(s0 ^ s2.rotate_left(9)) << 32 | u64::from(s1 ^ s3.rotate_left(21)));
        let dest = u64::from(d0 ^ d2.rotate_left(9)) << 32 | u64::from(d1 ^ d3.rotate_left(21));
        hash::mix64(source ^ dest.rotate_left(17) ^ u64::from(ports) << 8 ^ u64::from(proto)) as u32
    }
}

/// The same bytes as another type.
///
/// # Safety
///
/// `U` must be `T` with byte arrays for word arrays or the other way round, at addresses aligned by four.
#[inline(always)]
unsafe fn same_layout<T, U>(value: &T) -> &U {
    const { assert!(size_of::<T>() == size_of::<U>()) };
    // SAFETY: by the caller's word.
    unsafe { &*core::ptr::from_ref(value).cast() }
}
