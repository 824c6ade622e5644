//! `diff`: what this node has against what it should have, once.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use lb_core::{
    compile::{Compiler, NodeView},
    model::{Event, Warning},
    table::Changes,
};
use tokio::sync::mpsc;
use tracing::warn;

use super::{compare, mode_in_force, open};
use crate::{
    args::{DiffArgs, Mode, SourceConfig, node_name},
    datapath::ebpf::maps::Pins,
    netlink::{DeviceChoice, Netlink},
    source::{
        Notices, Report, Source,
        calls::Calls,
        kubernetes::{Access, Kubernetes},
        manifests::Manifests,
    },
};

/// Prints the differences, and says whether there are any.
pub fn diff(options: DiffArgs, pins: &Pins) -> Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the async runtime")?;
    let mode = match options.mode {
        Some(mode) => mode,
        None => mode_in_force(pins)?,
    };
    if mode == Mode::Ebpf && !pins.dir().is_dir() {
        bail!(
            "nothing is pinned under {}: is an agent running on this node, in mode ebpf and with this --bpf-root?",
            pins.dir().display()
        );
    }
    let name = node_name(options.node_name)?;
    let addresses = runtime.block_on(async {
        let netlink = Netlink::connect(DeviceChoice { external: None, pods: None })?;
        anyhow::Ok(netlink.read().await?.addresses)
    })?;
    let access = Access { kubeconfig: options.kubeconfig, context: options.context, master: None };
    let source = SourceConfig::new(options.manifests, access);
    let (events, mut warnings) = runtime.block_on(objects(source, &name))?;
    let view = NodeView { name: name.as_str().into(), addresses, zone: None, ..NodeView::default() };
    let settings = options.policy.settings()?;
    let mut compiler = Compiler::new(settings.compile(mode), view);
    events.into_iter().for_each(|event| compiler.apply(event));
    compiler.compile();
    if compiler.snapshot().node(&name).is_none() {
        warn!(node = name, "no such Node in the cluster: is --node-name right?");
    }
    warnings.extend(compiler.warnings().cloned());
    for warning in warnings {
        warn!(object = %warning.object, field = %warning.field, problem = %warning.problem, "look at this");
    }
    let pod_cidrs = compiler.snapshot().node(&name).map(|node| node.pod_cidrs.clone()).unwrap_or_default();
    let mut drift = open(mode, pins, &settings.rules_of(mode, &pod_cidrs), settings.ipvs.scheduler)?;
    let table = compiler.table();
    let desired = drift.desired(table, &Changes::all(table))?;
    let differences = compare(&desired, &drift.actual()?);
    differences.iter().for_each(|difference| println!("{difference}"));
    match differences.len() {
        0 => println!("mode {}: no differences in {} objects", mode.name(), desired.len()),
        1 => println!("mode {}: 1 difference", mode.name()),
        count => println!("mode {}: {count} differences", mode.name()),
    }
    Ok(!differences.is_empty())
}

/// A list of everything may take so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// All objects that there are now.
async fn objects(source: SourceConfig, node: &str) -> Result<(Vec<Event>, Vec<Warning>)> {
    let access = match source {
        SourceConfig::Manifests(dir) => {
            let (events, warnings) = Manifests::new(dir).scan()?;
            return Ok((events, warnings.into_iter().flat_map(|(_, warnings)| warnings).collect()));
        }
        SourceConfig::Kubernetes(access) => access,
    };
    let (sender, mut reports) = mpsc::channel(256);
    let (_, notices) = Notices::channel();
    let kubernetes =
        Kubernetes { access, node: node.into(), events: false, calls: Calls::default(), notices };
    let mut source = tokio::spawn(kubernetes.run(sender));
    let (mut events, mut warnings) = (Vec::new(), Vec::new());
    let patience = tokio::time::sleep(PATIENCE);
    tokio::pin!(patience);
    loop {
        tokio::select! {
            report = reports.recv() => match report {
                Some(Report::Changed(changed)) => events.extend(changed),
                Some(Report::Warnings(_, of_object)) => warnings.extend(of_object),
                Some(Report::Synced) => {
                    source.abort();
                    return Ok((events, warnings));
                }
                None => return (&mut source).await.context("the source panicked")?.and_then(|()| bail!("the source ended")),
            },
            () = &mut patience => bail!("the API server didn't list all objects within {} s: is it away?", PATIENCE.as_secs()),
        }
    }
}
