//! `render`: what a node would be programmed with, from manifests alone.

use anyhow::{Result, bail};
use lb_core::{
    compile::{Compiler, NodeView},
    model::Family,
    rules::{
        incremental,
        iptables::{Config, Translation},
        ipvs::{Servers, sets::Set},
        nftables,
    },
};
use tracing::warn;

use crate::{
    args::{Mode, RenderArgs},
    source::manifests::Manifests,
};

/// Prints it.
pub fn render(options: &RenderArgs) -> Result<()> {
    print!("{}", text(options)?);
    Ok(())
}

/// For ipvs: the input of ipset, iptables-restore, ipvsadm and ip; for nftables: the input of `nft -f`; for iptables: the input of `iptables-restore --noflush` and `ip6tables-restore --noflush`; for ebpf: the table that
/// the maps are filled from.
pub fn text(options: &RenderArgs) -> Result<String> {
    let (events, file_warnings) = Manifests::new(options.manifests.clone()).scan()?;
    let view = NodeView { name: options.node_name.as_str().into(), ..NodeView::default() };
    let settings = options.policy.settings()?;
    let mut compiler = Compiler::new(settings.compile(options.mode), view);
    events.into_iter().for_each(|event| compiler.apply(event));
    let Some(node) = compiler.snapshot().node(&options.node_name) else {
        let known: Vec<&str> = compiler.snapshot().nodes().map(|node| &*node.name).collect();
        bail!(
            "no Node {} in {}: there {} {}",
            options.node_name,
            options.manifests.display(),
            if known.len() == 1 { "is" } else { "are" },
            if known.is_empty() { "none".to_owned() } else { known.join(", ") }
        );
    };
    let (addresses, pod_cidrs) = (node.addresses.clone(), node.pod_cidrs.clone());
    let own = addresses.clone();
    compiler.set_addresses(addresses);
    compiler.compile();
    let of_files = file_warnings.iter().flat_map(|(_, warnings)| warnings);
    for warning in of_files.chain(compiler.warnings()) {
        warn!(object = %warning.object, field = %warning.field, problem = %warning.problem, "look at this");
    }
    let table = compiler.table();
    let rules = settings.rules_of(options.mode, &pod_cidrs);
    Ok(match options.mode {
        Mode::Ebpf => table.to_string(),
        Mode::Iptables => [Family::V4, Family::V6]
            .map(|family| format!("# {family}\n{}", incremental::Rules::all(table, family, &rules)))
            .concat(),
        Mode::Nftables => [Family::V4, Family::V6]
            .map(|family| nftables::Rules::all(table, family, &rules).to_string())
            .concat(),
        Mode::Ipvs => {
            let rules = Config { translation: Translation::Ipvs, ..rules };
            let source = |addr| own.iter().copied().find(|own| Family::of(*own) == Family::of(addr));
            [Family::V4, Family::V6]
                .map(|family| {
                    let chains = incremental::Rules::all(table, family, &rules);
                    let sets = Set::ALL.map(|set| format!("{}\n", set.create(family))).concat();
                    let servers = Servers::all(table, family, settings.ipvs.scheduler).text(source);
                    format!(
                        "# {family}\n# ipset restore\n{sets}# iptables-restore --noflush\n{chains}{servers}"
                    )
                })
                .concat()
        }
    })
}
