//! What a node should have in its kernel, against what it has, by meaning: for `diff` and `run --dry-run`.
//!
//! A mode lists both sides in the same words, and [`compare`] doesn't know which mode it is. Netfilter's rules are
//! loaded into a network namespace of our own and listed by the program that lists the machine's, so that nothing has
//! to be known of how it prints them.

pub mod command;
pub mod dry_run;
mod ebpf;
mod iptables;
mod ipvs;
mod nftables;

use std::{collections::BTreeMap, fmt};

use anyhow::{Context, Result, bail};
use lb_core::{
    rules::{
        iptables::{Config, Translation},
        ipvs::Scheduler,
    },
    table::{Changes, ServiceTable},
};

use crate::{
    args::Mode,
    datapath::{self, ebpf::maps::Pins},
    scratch::Scratch,
};

/// One named thing in the kernel: a frontend, a chain, a map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Object {
    /// What it holds.
    pub lines: Vec<String>,
    /// Their order counts.
    pub ordered: bool,
}

/// Things by name, as people read them.
pub type Listing = BTreeMap<String, Object>;

/// Both sides of one mode.
pub trait Drift: Send {
    /// What the mode makes of `table`; `changes` names the keys that may differ from the last call's, all of them in
    /// the first.
    fn desired(&mut self, table: &ServiceTable, changes: &Changes) -> Result<Listing>;

    /// What the kernel holds. Only reads.
    fn actual(&mut self) -> Result<Listing>;
}

/// Prepares a comparison; the kernel's state is only read.
pub fn open(mode: Mode, pins: &Pins, rules: &Config, scheduler: Scheduler) -> Result<Box<dyn Drift>> {
    let scratch = || Scratch::new().context("make a network namespace to load rules in: are we root?");
    Ok(match mode {
        Mode::Ebpf => Box::new(ebpf::EbpfDrift::open(pins)?),
        Mode::Nftables => Box::new(nftables::NftablesDrift::open(rules, scratch()?)?),
        Mode::Iptables => Box::new(iptables::IptablesDrift::open(rules, scratch()?)?),
        Mode::Ipvs => Box::new(ipvs::IpvsDrift::open(rules, scheduler, scratch()?)?),
    })
}

/// The mode this node is served in now: by us, else by kube-proxy.
pub fn mode_in_force(pins: &Pins) -> Result<Mode> {
    let serves = |mode, all| -> Result<bool> {
        Ok(match mode {
            Mode::Ebpf => pins.dir().is_dir(),
            Mode::Nftables => !datapath::nftables::removals(all).is_empty(),
            Mode::Iptables => datapath::iptables::serves(all)? == Some(Translation::Rules),
            Mode::Ipvs => datapath::iptables::serves(all)? == Some(Translation::Ipvs),
        })
    };
    for all in [false, true] {
        for mode in [Mode::Ebpf, Mode::Nftables, Mode::Iptables, Mode::Ipvs] {
            if serves(mode, all)? {
                return Ok(mode);
            }
        }
    }
    bail!(
        "no mode serves this node: there is nothing under {}, no nftables table kube-proxy and no chain KUBE-SERVICES; \
         give --mode to see what is missing",
        pins.dir().display()
    )
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// There is no such thing.
    Missing(String),
    /// There should be no such thing.
    Extra(String),
    /// The thing lacks this.
    Lacks(String, String),
    /// The thing has this and should not.
    Has(String, String),
    /// The thing has what it should, in another order.
    Order(String),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(object) => write!(f, "missing: {object}"),
            Self::Extra(object) => write!(f, "extra: {object}"),
            Self::Lacks(object, line) => write!(f, "missing in {object}: {line}"),
            Self::Has(object, line) => write!(f, "extra in {object}: {line}"),
            Self::Order(object) => write!(f, "in another order: {object}"),
        }
    }
}

/// All differences, by object.
pub fn compare(desired: &Listing, actual: &Listing) -> Vec<Difference> {
    let mut differences = Vec::new();
    for (name, object) in desired {
        match actual.get(name) {
            Some(found) => inside(name, object, found, &mut differences),
            None => differences.push(Difference::Missing(name.clone())),
        }
    }
    let extra = actual.keys().filter(|name| !desired.contains_key(*name));
    differences.extend(extra.cloned().map(Difference::Extra));
    differences
}

fn inside(name: &str, desired: &Object, actual: &Object, differences: &mut Vec<Difference>) {
    if desired.lines == actual.lines {
        return;
    }
    // A line may stand there twice.
    let mut counts: BTreeMap<&str, isize> = BTreeMap::new();
    desired.lines.iter().for_each(|line| *counts.entry(line).or_default() += 1);
    actual.lines.iter().for_each(|line| *counts.entry(line).or_default() -= 1);
    let before = differences.len();
    for (line, count) in counts {
        let (object, line) = (name.to_owned(), line.to_owned());
        match count {
            0 => {}
            1.. => differences.push(Difference::Lacks(object, line)),
            _ => differences.push(Difference::Has(object, line)),
        }
    }
    if differences.len() == before && desired.ordered {
        differences.push(Difference::Order(name.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(objects: &[(&str, &[&str])]) -> Listing {
        let object =
            |lines: &[&str]| Object { lines: lines.iter().map(ToString::to_string).collect(), ordered: true };
        objects.iter().map(|(name, lines)| ((*name).to_owned(), object(lines))).collect()
    }

    #[test]
    fn each_kind_of_difference_is_named() {
        let desired = listing(&[
            ("chain A", &["one", "two"]),
            ("chain B", &["one", "two"]),
            ("chain C", &[]),
            ("chain E", &["one"]),
        ]);
        let actual = listing(&[
            ("chain A", &["two", "three"]),
            ("chain B", &["two", "one"]),
            ("chain D", &["one"]),
            ("chain E", &["one", "one"]),
        ]);
        let said: String = compare(&desired, &actual).iter().map(|it| format!("{it}\n")).collect();
        expect_test::expect![[r#"
            missing in chain A: one
            extra in chain A: three
            in another order: chain B
            missing: chain C
            extra in chain E: one
            extra: chain D
        "#]]
        .assert_eq(&said);
        assert_eq!(compare(&desired, &desired), []);
    }

    #[test]
    fn order_counts_only_where_it_matters() {
        let mut desired = listing(&[("map", &["a", "b"])]);
        desired.values_mut().for_each(|object| object.ordered = false);
        assert_eq!(compare(&desired, &listing(&[("map", &["b", "a"])])), []);
    }
}
