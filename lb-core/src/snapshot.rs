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
    service_cidrs: BTreeMap<Arc<str>, Vec<IpNet>>,
    pods: BTreeMap<ObjectName, Pod>,
}

/// What has to be resolved anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dirty {
    /// These Services.
    Services(BTreeSet<ObjectName>),
    /// All of them: node facts changed.
    All,
}

impl ClusterSnapshot {
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
            Event::Node(node) => {
                let before = self.nodes.insert(node.name.clone(), node.clone());
                if before.as_ref() != Some(&node) {
                    return Dirty::All;
                }
            }
            Event::NodeGone(name) => {
                if self.nodes.remove(&name).is_some() {
                    return Dirty::All;
                }
            }
        }
        Dirty::Services(dirty)
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

    /// Every address of every Node.
    pub fn node_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.nodes.values().flat_map(|node| node.addresses.iter().copied())
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
