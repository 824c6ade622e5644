//! What is known of the cluster now, and which Services an event may change.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use litemap::LiteMap;

use crate::{
    model::{EndpointSlice, Event, Node, ObjectName, Pod, Service},
    pods,
};

/// All objects, by name.
#[derive(Clone, Debug, Default)]
pub struct ClusterSnapshot {
    services: BTreeMap<ObjectName, Service>,
    /// Slices by their Service, then by their own name; kept even if the Service isn't known (yet).
    slices: BTreeMap<ObjectName, LiteMap<ObjectName, EndpointSlice>>,
    slice_owners: HashMap<ObjectName, ObjectName>,
    nodes: BTreeMap<Arc<str>, Node>,
    /// How many Nodes have an address.
    node_addresses: HashMap<IpAddr, usize>,
    service_cidrs: BTreeMap<Arc<str>, Vec<IpNet>>,
    pods: BTreeMap<ObjectName, Pod>,
}

/// What an event may change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// Services to be resolved anew.
    pub services: BTreeSet<ObjectName>,
    /// Nodes that say something else now.
    pub nodes: BTreeSet<Arc<str>>,
    /// Addresses that such a Node has or had.
    pub addresses: BTreeSet<IpAddr>,
}

impl Dirty {
    /// Adds what `other` has.
    pub fn merge(&mut self, other: Self) {
        self.services.extend(other.services);
        self.nodes.extend(other.nodes);
        self.addresses.extend(other.addresses);
    }
}

impl ClusterSnapshot {
    /// An event as the node named `own` takes it; `None` changes nothing there.
    ///
    /// What the Node object of a running node said outlives the object: one that is deleted takes no pod away, and one
    /// that is made anew has neither addresses nor pod ranges until its kubelet and controller report them.
    pub fn seen_by(&self, own: &str, event: Event) -> Option<Event> {
        match event {
            Event::NodeGone(name) if *name == *own => None,
            Event::Node(mut node) if *node.name == *own => {
                let known = self.nodes.get(own);
                if let Some(known) = known.filter(|_| node.addresses.is_empty()) {
                    node.addresses.clone_from(&known.addresses);
                }
                if let Some(known) = known.filter(|_| node.pod_cidrs.is_empty()) {
                    node.pod_cidrs.clone_from(&known.pod_cidrs);
                }
                Some(Event::Node(node))
            }
            event => Some(event),
        }
    }

    /// Takes an event in and says what it may change.
    pub fn apply(&mut self, event: Event) -> Dirty {
        let mut dirty = BTreeSet::new();
        match event {
            Event::Service(service) => {
                dirty.insert(service.name.clone());
                self.services.insert(service.name.clone(), service);
            }
            Event::ServiceGone(name) => {
                self.services.remove(&name);
                dirty.insert(name);
            }
            Event::EndpointSlice(slice) => {
                dirty.extend(self.remove_slice(&slice.name));
                dirty.insert(slice.service.clone());
                self.slice_owners.insert(slice.name.clone(), slice.service.clone());
                let slices =
                    self.slices.entry(slice.service.clone()).or_insert_with(|| LiteMap::with_capacity(1));
                slices.insert(slice.name.clone(), slice);
            }
            Event::EndpointSliceGone(name) => dirty.extend(self.remove_slice(&name)),
            Event::Pod(pod) => {
                let before = self.pods.remove(&pod.name);
                dirty.extend(before.iter().flat_map(|pod| self.selecting(pod)));
                dirty.extend(self.selecting(&pod));
                self.pods.insert(pod.name.clone(), pod);
            }
            Event::PodGone(name) => {
                let before = self.pods.remove(&name);
                dirty.extend(before.iter().flat_map(|pod| self.selecting(pod)));
            }
            // They change no Service.
            Event::ServiceCidr(range) => drop(self.service_cidrs.insert(range.name, range.cidrs)),
            Event::ServiceCidrGone(name) => drop(self.service_cidrs.remove(&name)),
            Event::Node(node) => return self.replace_node(&node.name.clone(), Some(node)),
            Event::NodeGone(name) => return self.replace_node(&name, None),
        }
        Dirty { services: dirty, ..Dirty::default() }
    }

    fn replace_node(&mut self, name: &Arc<str>, node: Option<Node>) -> Dirty {
        if self.nodes.get(name) == node.as_ref() {
            return Dirty::default();
        }
        let mut dirty = Dirty { nodes: BTreeSet::from([name.clone()]), ..Dirty::default() };
        for addr in node.iter().flat_map(|node| &node.addresses) {
            *self.node_addresses.entry(*addr).or_default() += 1;
            dirty.addresses.insert(*addr);
        }
        let before = match node {
            Some(node) => self.nodes.insert(name.clone(), node),
            None => self.nodes.remove(name),
        };
        for addr in before.into_iter().flat_map(|before| before.addresses) {
            if let Some(count) = self.node_addresses.get_mut(&addr) {
                *count -= 1;
                if *count == 0 {
                    self.node_addresses.remove(&addr);
                }
            }
            dirty.addresses.insert(addr);
        }
        dirty
    }

    /// A Service by name.
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name)
    }

    /// All Services.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values()
    }

    /// A Node by name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// All Nodes.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// The address is one of a Node's.
    pub fn is_node_address(&self, addr: IpAddr) -> bool {
        self.node_addresses.contains_key(&addr)
    }

    /// Ranges that ClusterIPs are allocated from.
    pub fn service_cidrs(&self) -> BTreeSet<IpNet> {
        self.service_cidrs.values().flatten().copied().collect()
    }

    /// The Service's slices: the cluster's own, or else those its Pods amount to.
    pub fn slices(&self, service: &Service) -> Vec<EndpointSlice> {
        match self.slices.get(&service.name) {
            Some(slices) if !slices.is_empty() => slices.values().cloned().collect(),
            _ => pods::slices(service, self.pods.values()),
        }
    }

    fn selecting<'a>(&'a self, pod: &'a Pod) -> impl Iterator<Item = ObjectName> + 'a {
        self.services
            .values()
            .filter(|service| pods::selects(service, pod))
            .map(|service| service.name.clone())
    }

    fn remove_slice(&mut self, name: &ObjectName) -> Option<ObjectName> {
        let owner = self.slice_owners.remove(name)?;
        let slices = self.slices.get_mut(&owner)?;
        slices.remove(name);
        if slices.is_empty() {
            self.slices.remove(&owner);
        }
        Some(owner)
    }
}
