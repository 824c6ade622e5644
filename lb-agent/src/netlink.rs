//! This node's devices, addresses and routes, from the kernel; and the news when they change.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt, channel::mpsc::UnboundedReceiver};
use lb_core::rules::ipvs;
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder, new_multicast_connection,
    packet_route::{
        address::{AddressAttribute, AddressScope},
        link::{InfoKind, LinkAttribute, LinkInfo},
        route::RouteAttribute,
    },
};

/// What a device is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceClass {
    /// Packets from outside the node come in by it.
    External,
    /// The host side of a pod's veth.
    Pod,
    /// None of our business.
    Other,
}

/// A device of this network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Index.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// What it is to us.
    pub class: DeviceClass,
    /// A veth: its frames may come from a local peer.
    pub is_veth: bool,
    /// Primary IPv4 address.
    pub addr4: Option<Ipv4Addr>,
    /// Primary global IPv6 address.
    pub addr6: Option<Ipv6Addr>,
}

/// All there is to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostNetwork {
    /// Devices by index.
    pub devices: Vec<Device>,
    /// Global addresses of all devices, sorted.
    pub addresses: Vec<IpAddr>,
    /// The address packets leave from by the default route.
    pub main4: Option<Ipv4Addr>,
    /// As `main4`.
    pub main6: Option<Ipv6Addr>,
}

/// Which devices the operator names.
#[derive(Clone, Debug, Default)]
pub struct DeviceChoice {
    /// External devices; `None` finds them.
    pub external: Option<Vec<String>>,
    /// Pod devices; `None` finds them, an empty list is none.
    pub pods: Option<Vec<String>>,
}

/// A connection to rtnetlink.
pub struct Netlink {
    handle: Handle,
    news: UnboundedReceiver<(
        rtnetlink::packet_core::NetlinkMessage<rtnetlink::packet_route::RouteNetlinkMessage>,
        rtnetlink::sys::SocketAddr,
    )>,
    choice: DeviceChoice,
}

impl Netlink {
    /// Connects, and listens to changes of links, addresses, routes and neighbours.
    pub fn connect(choice: DeviceChoice) -> Result<Self> {
        let (connection, handle, news) = new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Neigh,
        ])
        .context("connect to rtnetlink")?;
        tokio::spawn(connection);
        Ok(Self { handle, news, choice })
    }

    /// Waits for a change, and a moment longer for those that come with it.
    pub async fn changed(&mut self) {
        if self.news.next().await.is_none() {
            // The connection is gone; without news the last state holds.
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        while self.news.try_recv().is_ok() {}
    }

    /// Reads everything.
    pub async fn read(&self) -> Result<HostNetwork> {
        let mut found = Found::default();
        self.read_links(&mut found).await.context("list links")?;
        self.read_addresses(&mut found).await.context("list addresses")?;
        self.read_routes(&mut found).await.context("list routes")?;
        Ok(found.classify(&self.choice))
    }

    async fn read_links(&self, found: &mut Found) -> Result<()> {
        let mut links = self.handle.link().get().execute();
        while let Some(link) = links.try_next().await? {
            let mut raw = RawDevice { ifindex: link.header.index, ..RawDevice::default() };
            for attribute in link.attributes {
                match attribute {
                    LinkAttribute::IfName(name) => raw.name = name,
                    LinkAttribute::LinkNetNsId(_) => raw.peer_elsewhere = true,
                    LinkAttribute::LinkInfo(infos) => {
                        raw.kind = infos.into_iter().find_map(|info| match info {
                            LinkInfo::Kind(kind) => Some(kind),
                            _ => None,
                        });
                    }
                    _ => {}
                }
            }
            found.devices.insert(raw.ifindex, raw);
        }
        Ok(())
    }

    async fn read_addresses(&self, found: &mut Found) -> Result<()> {
        let mut addresses = self.handle.address().get().execute();
        while let Some(address) = addresses.try_next().await? {
            if address.header.scope != AddressScope::Universe {
                continue;
            }
            let local = |attribute: &AddressAttribute| match attribute {
                AddressAttribute::Local(addr) => Some(*addr),
                _ => None,
            };
            let any = |attribute: &AddressAttribute| match attribute {
                AddressAttribute::Address(addr) => Some(*addr),
                _ => None,
            };
            // IPv4 has both, and Address is the peer of a point-to-point link; IPv6 has Address alone.
            let addr =
                address.attributes.iter().find_map(local).or_else(|| address.attributes.iter().find_map(any));
            if let (Some(addr), Some(device)) = (addr, found.devices.get_mut(&address.header.index))
                && !addr.is_loopback()
            {
                device.addresses.push(addr);
            }
        }
        Ok(())
    }

    async fn read_routes(&self, found: &mut Found) -> Result<()> {
        for route in
            [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()]
        {
            let mut routes = self.handle.route().get(route).execute();
            while let Some(route) = routes.try_next().await? {
                if route.header.destination_prefix_length != 0 {
                    continue;
                }
                for attribute in route.attributes {
                    match attribute {
                        RouteAttribute::Oif(oif) => drop(found.default_devices.insert(oif)),
                        RouteAttribute::MultiPath(hops) => {
                            found.default_devices.extend(hops.iter().map(|hop| hop.interface_index));
                        }
                        _ => {}
                    }
                }
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Found {
    devices: BTreeMap<u32, RawDevice>,
    default_devices: BTreeSet<u32>,
}

#[derive(Default)]
struct RawDevice {
    ifindex: u32,
    name: String,
    kind: Option<InfoKind>,
    /// IFLA_LINK_NETNSID: its peer is in another network namespace.
    peer_elsewhere: bool,
    addresses: Vec<IpAddr>,
}

impl Found {
    fn classify(self, choice: &DeviceChoice) -> HostNetwork {
        let mut network = HostNetwork::default();
        for raw in self.devices.values() {
            let is_default = self.default_devices.contains(&raw.ifindex);
            let addr4 = raw.addresses.iter().find_map(|addr| match addr {
                IpAddr::V4(addr) => Some(*addr),
                IpAddr::V6(_) => None,
            });
            let addr6 = raw.addresses.iter().find_map(|addr| match addr {
                IpAddr::V6(addr) => Some(*addr),
                IpAddr::V4(_) => None,
            });
            if is_default {
                network.main4 = network.main4.or(addr4);
                network.main6 = network.main6.or(addr6);
            }
            // What IPVS bound are VIPs, not addresses of the node.
            if raw.name != ipvs::DEVICE {
                network.addresses.extend(&raw.addresses);
            }
            network.devices.push(Device {
                ifindex: raw.ifindex,
                name: raw.name.clone(),
                class: raw.class(is_default, choice),
                is_veth: raw.kind == Some(InfoKind::Veth),
                addr4,
                addr6,
            });
        }
        network.addresses.sort_unstable();
        network.addresses.dedup();
        network.main4 = network.main4.or_else(|| network.external().find_map(|device| device.addr4));
        network.main6 = network.main6.or_else(|| network.external().find_map(|device| device.addr6));
        network
    }
}

impl HostNetwork {
    fn external(&self) -> impl Iterator<Item = &Device> {
        self.devices.iter().filter(|device| device.class == DeviceClass::External)
    }
}

impl RawDevice {
    /// External: named, or with a default route, or an overlay, or a device with an address that is no bridge.
    fn class(&self, has_default_route: bool, choice: &DeviceChoice) -> DeviceClass {
        let named = |names: &[String]| names.contains(&self.name);
        let external = match &choice.external {
            Some(names) => named(names),
            None => {
                has_default_route
                    || self.is_overlay()
                    || (self.is_ethernet_like() && !self.addresses.is_empty())
            }
        };
        if external && self.name != "lo" && self.name != ipvs::DEVICE {
            return DeviceClass::External;
        }
        let pod = match &choice.pods {
            Some(names) => named(names),
            None => self.kind == Some(InfoKind::Veth) && self.peer_elsewhere,
        };
        if pod { DeviceClass::Pod } else { DeviceClass::Other }
    }

    /// Overlays that carry Ethernet frames; those without Ethernet header are left to the stack.
    fn is_overlay(&self) -> bool {
        matches!(self.kind, Some(InfoKind::Vxlan | InfoKind::Geneve))
    }

    /// A physical device (it has no kind), or one of those that stand for one.
    fn is_ethernet_like(&self) -> bool {
        matches!(self.kind, None | Some(InfoKind::Bond | InfoKind::Vlan | InfoKind::MacVlan | InfoKind::Veth))
    }
}

/// The source ports for masqueraded flows: the larger of the two ranges beside the host's ephemeral ports, without
/// the usual NodePorts and the privileged ports. First port and count.
pub fn snat_ports(ephemeral: (u16, u16)) -> (u16, u16) {
    const NODE_PORTS: (u16, u16) = (30000, 32767);
    let below_end = ephemeral.0.min(NODE_PORTS.0);
    let below = below_end.saturating_sub(1024);
    let above_end = ephemeral.1.max(NODE_PORTS.1);
    let above = u16::MAX - above_end;
    if below >= above { (1024, below) } else { (above_end + 1, above) }
}

/// `net.ipv4.ip_local_port_range`, which holds for IPv6 too.
pub fn ephemeral_ports() -> (u16, u16) {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ports = text.split_whitespace().filter_map(|port| port.parse().ok());
    match (ports.next(), ports.next()) {
        (Some(first), Some(last)) => (first, last),
        // The kernel's default (`net/ipv4/af_inet.c`).
        _ => (32768, 60999),
    }
}

/// Sysctls without which packets for pods are not forwarded, that are off.
pub fn forwarding_off() -> Vec<&'static str> {
    [
        ("net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward"),
        ("net.ipv6.conf.all.forwarding", "/proc/sys/net/ipv6/conf/all/forwarding"),
    ]
    .into_iter()
    .filter(|(_, path)| fs::read_to_string(path).is_ok_and(|text| text.trim() == "0"))
    .map(|(name, _)| name)
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masqueraded_flows_stay_off_the_hosts_own_ports() {
        let rows = [
            ((32768, 60999), (1024, 28976)),
            ((1024, 65535), (1024, 0)),
            ((1024, 20000), (32768, 32768)),
            ((15000, 60999), (1024, 13976)),
        ];
        for (ephemeral, expected) in rows {
            let (first, count) = snat_ports(ephemeral);
            assert_eq!((first, count), expected, "{ephemeral:?}");
        }
    }

    #[test]
    fn devices_are_told_apart() {
        let device = |name: &str, kind, peer_elsewhere, addr: Option<&str>| RawDevice {
            ifindex: 2,
            name: name.into(),
            kind,
            peer_elsewhere,
            addresses: addr.map(|addr| addr.parse().expect("an address")).into_iter().collect(),
        };
        let auto = DeviceChoice::default();
        let named = DeviceChoice { external: Some(vec!["eth1".into()]), pods: Some(Vec::new()) };
        let rows = [
            (device("eth0", None, false, Some("192.0.2.1")), false, &auto, DeviceClass::External),
            (
                device("eth0", Some(InfoKind::Veth), true, Some("192.0.2.1")),
                true,
                &auto,
                DeviceClass::External,
            ),
            (device("veth1", Some(InfoKind::Veth), true, None), false, &auto, DeviceClass::Pod),
            (device("veth1", Some(InfoKind::Veth), false, None), false, &auto, DeviceClass::Other),
            (
                device("cni0", Some(InfoKind::Bridge), false, Some("10.244.1.1")),
                false,
                &auto,
                DeviceClass::Other,
            ),
            (
                device("flannel.1", Some(InfoKind::Vxlan), false, Some("10.244.1.0")),
                false,
                &auto,
                DeviceClass::External,
            ),
            (device("lo", None, false, None), false, &auto, DeviceClass::Other),
            (device("eth0", None, false, Some("192.0.2.1")), true, &named, DeviceClass::Other),
            (device("eth1", None, false, None), false, &named, DeviceClass::External),
            (device("veth1", Some(InfoKind::Veth), true, None), false, &named, DeviceClass::Other),
        ];
        for (device, default, choice, expected) in rows {
            assert_eq!(device.class(default, choice), expected, "{}", device.name);
        }
    }
}
