//! Loads every program once and says what the verifier had to do for it.

use std::{collections::BTreeMap, fs, path::PathBuf};

use anyhow::{Context, Result, bail};
use aya::{Ebpf, EbpfLoader, programs::ProgramInfo};
use clap::Parser;
use lb_agent::datapath::ebpf::{load::load_program, objects};

/// Loads each program once; with a budget file, fails if one needs more than its budget.
#[derive(Parser)]
struct Args {
    /// Budgets, as lines `program = verified instructions`.
    #[arg(long, conflicts_with = "write")]
    budget: Option<PathBuf>,
    /// Write new budgets: what is needed now, plus a fifth.
    #[arg(long)]
    write: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    objects::NORMAL.check()?;
    objects::TRACE.check()?;
    let mut measured = BTreeMap::new();
    for (name, object) in
        [("xdp", objects::NORMAL.xdp), ("tc", objects::NORMAL.tc), ("sock", objects::NORMAL.sock)]
    {
        measure(&mut load(name, object)?, &mut measured)?;
    }
    // Those that log have no other limit than the kernel's, but come closer to it.
    for (name, object) in [("trace/xdp", objects::TRACE.xdp), ("trace/tc", objects::TRACE.tc)] {
        let mut tracing = BTreeMap::new();
        measure(&mut load(name, object)?, &mut tracing)?;
        measured.extend(tracing.into_iter().map(|(name, cost)| (format!("trace {name}"), cost)));
    }
    println!("{:<20} {:>10} {:>8} {:>8}", "PROGRAM", "VERIFIED", "XLATED", "JITED");
    for (name, info) in &measured {
        println!("{name:<20} {:>10} {:>8} {:>8}", info.verified, info.translated, info.jited);
    }
    if let Some(path) = args.write {
        let lines =
            measured.iter().map(|(name, info)| format!("{name} = {}\n", info.verified + info.verified / 5));
        let text =
            "# Verified instructions each program may need; `cargo xtask verifier --write` renews them.\n"
                .to_owned();
        fs::write(&path, text + &lines.collect::<String>())
            .with_context(|| format!("write {}", path.display()))?;
    }
    match args.budget {
        Some(path) => check(&path, &measured),
        None => Ok(()),
    }
}

/// With small tables: this loads only.
fn load(name: &str, object: &[u8]) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    loader.map_max_entries("LB4_FLOWS", 1024).map_max_entries("LB6_FLOWS", 1024);
    loader.load(object).with_context(|| format!("load {name}.o"))
}

struct Cost {
    verified: u32,
    translated: u32,
    jited: u32,
}

fn measure(ebpf: &mut Ebpf, measured: &mut BTreeMap<String, Cost>) -> Result<()> {
    for (name, program) in ebpf.programs_mut() {
        load_program(program).with_context(|| format!("load {name}"))?;
        let info: ProgramInfo = program.info().with_context(|| format!("ask about {name}"))?;
        let cost = Cost {
            verified: info
                .verified_instruction_count()
                .context("verified instruction count (kernel 5.16)")?,
            translated: info.size_translated().unwrap_or(0),
            jited: info.size_jitted(),
        };
        measured.insert(name.to_owned(), cost);
    }
    Ok(())
}

fn check(path: &PathBuf, measured: &BTreeMap<String, Cost>) -> Result<()> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let budgets: BTreeMap<&str, u32> = text
        .lines()
        .filter(|line| !line.starts_with('#') && !line.trim().is_empty())
        .map(|line| {
            let (name, number) =
                line.split_once('=').with_context(|| format!("{}: {line:?}", path.display()))?;
            Ok((name.trim(), number.trim().parse()?))
        })
        .collect::<Result<_>>()?;
    let mut over = Vec::new();
    for (name, cost) in measured {
        match budgets.get(name.as_str()) {
            Some(budget) if cost.verified <= *budget => {}
            Some(budget) => {
                over.push(format!("{name}: {} verified instructions, budget {budget}", cost.verified));
            }
            None => over.push(format!("{name}: no budget")),
        }
    }
    if !over.is_empty() {
        bail!(
            "{}\nmake it smaller, or raise the budget with `cargo xtask verifier --write` and say why",
            over.join("\n")
        );
    }
    Ok(())
}
