//! Kubernetes' e2e cases as manifests, step by step, and what becomes of them: the table, the maps, and the rules of every
//! mode. `docs/e2e.md` says which case is in which folder. `UPDATE_EXPECT=1 cargo test -p lb-agent --test golden_e2e` writes
//! what comes of them anew: read the difference before it is committed.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use expect_test::expect_file;
use lb_agent::{
    datapath::ebpf::{
        plan::{Actual, Planner},
        sizes::Capacity,
    },
    source::manifests::Manifests,
};
use lb_common::abi::{SlotRange, backend_flags, frontend_flags, vip_kind};
use lb_core::{compile::Compiler, table::ServiceTable};

/// The case's steps: each takes the place of all Services and EndpointSlices of the one before.
fn steps(case: &Path) -> Vec<PathBuf> {
    (1..).map(|step| case.join(format!("{step}.yaml"))).take_while(|step| step.exists()).collect()
}

fn cases() -> BTreeMap<String, PathBuf> {
    let entries = fs::read_dir(common::golden().join("e2e")).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), path)).collect()
}

#[test]
fn every_step_of_every_case() {
    let empty = rules(&common::folder("e2e-empty"));
    for (name, case) in cases() {
        println!("{name}");
        let (mut compiler, mut planner, mut maps) = begin();
        let dir = common::folder(&format!("e2e-{name}"));
        let mut manifests = Manifests::new(dir.clone());
        let steps = steps(&case);
        assert!(!steps.is_empty(), "{name} has no 1.yaml");
        for step in &steps {
            fs::copy(step, dir.join("case.yaml")).unwrap();
            let (events, of_files) = manifests.scan().unwrap();
            assert!(of_files.iter().all(|(_, warnings)| warnings.is_empty()), "{name}: {of_files:?}");
            follow(&mut compiler, &mut planner, &mut maps, events);
            let table = common::table(&compiler, []);
            assert_eq!(table, afresh(&dir), "{}: not as if it had begun with it", step.display());
            let mut text = format!("== table\n{table}== maps\n{}", image(&maps));
            for (mode, rules) in rules(&dir) {
                write!(text, "== {mode}\n{}", without(&rules, &empty[mode])).unwrap();
            }
            expect_file![step.with_extension("txt")].assert_eq(&text);
        }
    }
}

fn begin() -> (Compiler, Planner, Actual) {
    let planner = Planner::adopt(Capacity::UNLIMITED, Actual::default(), &ServiceTable::default());
    (common::compiler(), planner, Actual::default())
}

/// A change on its way through compiler and planner into the maps.
fn follow(
    compiler: &mut Compiler,
    planner: &mut Planner,
    maps: &mut Actual,
    events: Vec<lb_core::model::Event>,
) {
    events.into_iter().for_each(|event| compiler.apply(event));
    let changes = compiler.compile();
    let (ops, refused) = planner.plan(compiler.table(), &changes);
    assert_eq!(refused, []);
    ops.iter().for_each(|op| maps.write(op));
}

/// The table of a folder, for one who sees all of it at once.
fn afresh(dir: &Path) -> String {
    let mut compiler = common::compiler();
    let (events, _) = Manifests::new(dir.to_owned()).scan().unwrap();
    events.into_iter().for_each(|event| compiler.apply(event));
    compiler.compile();
    common::table(&compiler, [])
}

/// What each mode that has rules loads.
fn rules(dir: &Path) -> BTreeMap<&'static str, String> {
    let options = ["--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"];
    ["iptables", "nftables", "ipvs"]
        .into_iter()
        .map(|mode| (mode, common::render(mode, dir, &options)))
        .collect()
}

/// The lines that an empty cluster hasn't got, under their headings. What an empty cluster has must all be
/// there, in that order.
fn without(text: &str, empty: &str) -> String {
    let mut empty = empty.lines().filter(|line| !line.trim().is_empty()).peekable();
    let mut kept = String::new();
    let mut headings: Vec<&str> = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let is_new = empty.next_if_eq(&line).is_none();
        if let level @ Some(_) = level(line) {
            headings.retain(|heading| self::level(heading) < level);
            headings.push(line);
        } else if is_new {
            kept.extend(headings.drain(..).flat_map(|heading| [heading, "\n"]));
            kept.extend([line, "\n"]);
        }
    }
    assert_eq!(empty.next(), None, "an empty cluster has this, too:\n{text}");
    kept
}

/// Which headings go below which: a family has programs, iptables has tables.
fn level(line: &str) -> Option<u8> {
    match line.as_bytes().first()? {
        b'#' if line.starts_with("# IPv") => Some(0),
        b'#' => Some(1),
        b'*' => Some(2),
        _ => None,
    }
}

/// The maps in words. Backends that are gone keep their place's generation.
fn image(maps: &Actual) -> String {
    let mut text = String::new();
    let mut line = |words: String| writeln!(text, "{}", words.trim_end()).unwrap();
    for (addr, value) in &maps.frontends {
        let range = |scope: &str, range: SlotRange| match range.count {
            0 => format!("{scope}=none"),
            count => format!("{scope}={}+{count}", range.first),
        };
        line(format!(
            "frontend {addr} service={} {} {} affinity={} {}",
            value.service_id,
            range("external", value.external),
            range("internal", value.internal),
            value.affinity_secs,
            words(value.flags, &FRONTEND_FLAGS),
        ));
    }
    let used: BTreeSet<u32> = maps
        .frontends
        .values()
        .flat_map(|value| [value.external, value.internal])
        .flat_map(|range| range.first..range.first + range.count)
        .collect();
    for slot in used {
        line(format!("slot {slot} backend={}", maps.slots[&slot]));
    }
    for ((family, id), backend) in &maps.backends {
        line(format!(
            "backend {family} {id} {} service={} generation={} {}",
            SocketAddr::new(backend.addr, backend.port),
            backend.service_id,
            backend.generation,
            words(backend.flags.into(), &BACKEND_FLAGS),
        ));
    }
    for (addr, kind) in &maps.vips {
        line(format!("vip {addr} {}", if *kind == vip_kind::VIP { "vip" } else { "node-address" }));
    }
    for (service, net) in &maps.source_ranges {
        line(format!("source-range service={service} {net}"));
    }
    text
}

const FRONTEND_FLAGS: [(u32, &str); 10] = [
    (frontend_flags::EXTERNAL_NONE_DROPS, "external-none-drops"),
    (frontend_flags::INTERNAL_NONE_DROPS, "internal-none-drops"),
    (frontend_flags::EXTERNAL_MASQ_REMOTE, "external-masq-remote"),
    (frontend_flags::EXTERNAL_MASQ_ALWAYS, "external-masq-always"),
    (frontend_flags::INTERNAL_MASQ_ALWAYS, "internal-masq-always"),
    (frontend_flags::EXTERNAL_LOCAL_LIST, "external-local-list"),
    (frontend_flags::INTERNAL_LOCAL_LIST, "internal-local-list"),
    (frontend_flags::SOURCE_RANGES, "source-ranges"),
    (frontend_flags::SOURCE_RANGES_ALLOW_HOST, "source-ranges-allow-host"),
    (frontend_flags::HOST_ONLY, "host-only"),
];

const BACKEND_FLAGS: [(u32, &str); 5] = [
    (backend_flags::ALIVE as u32, "alive"),
    (backend_flags::IN_CLUSTER_LIST as u32, "cluster-list"),
    (backend_flags::IN_LOCAL_LIST as u32, "local-list"),
    (backend_flags::LOCAL as u32, "local"),
    (backend_flags::NODE_ADDRESS as u32, "node-address"),
];

fn words(bits: u32, names: &[(u32, &str)]) -> String {
    let known = names.iter().fold(0, |known, (bit, _)| known | bit);
    assert_eq!(bits & !known, 0, "flags without a name");
    let set: Vec<&str> = names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect();
    set.join(" ")
}

/// Each case of the list has its folder or says why not, and there is no folder without a case.
#[test]
fn every_case_of_the_list_has_a_folder() {
    let list = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/e2e.md");
    let list = fs::read_to_string(list).unwrap();
    let rows = || list.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| case"));
    let of = |row: &str| -> Vec<String> {
        let named = row.split("`golden/e2e/").skip(1);
        named.map(|rest| rest.split('`').next().unwrap().to_owned()).collect()
    };
    let silent: Vec<&str> = rows()
        .filter(|row| of(row).is_empty() && !row.contains("no golden: ") && !row.contains("| not "))
        .collect();
    assert!(silent.is_empty(), "no golden/e2e/ folder, and no reason:\n{}", silent.join("\n"));
    let listed: BTreeSet<String> = rows().flat_map(of).collect();
    assert_eq!(listed, cases().into_keys().collect());
    assert!(listed.len() > 30);
}
