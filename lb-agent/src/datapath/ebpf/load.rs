//! Loads the programs; maps are taken from their pins, or made and pinned.

use std::{
    io::ErrorKind,
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{Program, ProgramError},
};
use aya_log::EbpfLogger;
use lb_common::abi::TraceFilter;
use tokio::{runtime::Handle, task::JoinSet};

use super::{
    maps::{OF_SERVICES, PINNED, Pins, set_first},
    objects::{self, Objects},
    sizes::Capacity,
};
use crate::{datapath::DatapathError, trace::DecisionLog};

/// Which maps programs use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    /// Those that are pinned under their names.
    Present,
    /// Larger ones that are to take the place of those that hold Services.
    Next,
}

/// Loaded programs, by object.
pub struct Programs {
    xdp: Ebpf,
    tc: Ebpf,
    sock: Ebpf,
    /// Prints what the tracing build logs; ends with the programs.
    _logs: JoinSet<()>,
}

/// How to load programs.
#[derive(Clone)]
pub struct Loader {
    /// Where maps are pinned.
    pins: Pins,
    /// Entries in each flow table that isn't pinned yet.
    flows: u32,
    /// The tracing build is loaded and prints what it decides on such packets, on this runtime.
    trace: Option<(TraceFilter, Handle)>,
}

impl Loader {
    /// With maps under `pins`; a flow table that isn't pinned yet gets so many entries (two per connection).
    pub fn new(pins: &Pins, flows: u32) -> Self {
        Self { pins: pins.clone(), flows, trace: None }
    }

    /// The tracing build, with tasks on the current runtime.
    pub fn tracing(self, filter: TraceFilter) -> Self {
        Self { trace: Some((filter, Handle::current())), ..self }
    }

    /// Where maps are pinned.
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Loads all programs. A map that isn't pinned yet is made with this capacity.
    pub fn load(&self, capacity: Capacity, generation: Generation) -> Result<Programs, DatapathError> {
        let objects = if self.trace.is_some() { objects::TRACE } else { objects::NORMAL };
        objects.check()?;
        self.pins.create()?;
        self.pins.forget_next();
        let sizes = self.sizes(capacity);
        let maps = Maps::Pinned(&self.pins, generation, &sizes);
        let mut programs = Programs::of(&objects, &maps)?;
        if let Some((filter, runtime)) = &self.trace {
            programs.print_decisions(*filter, runtime)?;
        }
        Ok(programs)
    }

    fn sizes(&self, capacity: Capacity) -> [(&'static str, u32); 11] {
        let ([backends4, backends6], [frontends4, frontends6]) = (capacity.backends, capacity.frontends);
        let [ranges4, ranges6] = capacity.source_ranges;
        [
            ("LB4_FRONTENDS", frontends4),
            ("LB6_FRONTENDS", frontends6),
            ("LB4_VIPS", frontends4),
            ("LB6_VIPS", frontends6),
            ("SLOTS", capacity.slots),
            ("LB4_BACKENDS", backends4),
            ("LB6_BACKENDS", backends6),
            ("LB4_SOURCE_RANGES", ranges4),
            ("LB6_SOURCE_RANGES", ranges6),
            ("LB4_FLOWS", self.flows),
            ("LB6_FLOWS", self.flows),
        ]
    }
}

impl Programs {
    /// Loads all programs with small maps of their own: does this kernel take them? Nothing is pinned.
    pub fn trial(objects: &Objects) -> Result<Self, DatapathError> {
        objects.check()?;
        Self::of(objects, &Maps::Small)
    }

    fn of(objects: &Objects, maps: &Maps<'_>) -> Result<Self, DatapathError> {
        Ok(Self {
            xdp: load("xdp", objects.xdp, maps)?,
            tc: load("tc", objects.tc, maps)?,
            sock: load("sock", objects.sock, maps)?,
            _logs: JoinSet::new(),
        })
    }

    fn print_decisions(&mut self, filter: TraceFilter, runtime: &Handle) -> Result<(), DatapathError> {
        let mut logs = JoinSet::new();
        for (name, ebpf) in self.objects() {
            set_first(ebpf, "TRACE", filter)?;
            if name == "sock" {
                continue;
            }
            let mut logger =
                EbpfLogger::init_with_logger(ebpf, DecisionLog).map_err(|source| DatapathError::Kernel {
                    operation: "read the log of",
                    object: format!("{name}.o"),
                    source: source.into(),
                })?;
            logs.spawn_on(
                async move {
                    loop {
                        logger.flush();
                        tokio::time::sleep(TRACE_POLL).await;
                    }
                },
                runtime,
            );
        }
        self._logs = logs;
        Ok(())
    }

    /// The fd of a program.
    pub fn fd(&self, name: &'static str) -> Result<BorrowedFd<'_>, DatapathError> {
        let program = [&self.xdp, &self.tc, &self.sock].into_iter().find_map(|ebpf| ebpf.program(name));
        let error = |source: String| DatapathError::Kernel {
            operation: "find program",
            object: name.into(),
            source: source.into(),
        };
        let program = program.ok_or_else(|| error("not in the objects".into()))?;
        let fd = match program {
            Program::Xdp(program) => program.fd(),
            Program::SchedClassifier(program) => program.fd(),
            Program::CgroupSockAddr(program) => program.fd(),
            _ => return Err(error("of an unexpected type".into())),
        };
        Ok(fd.map_err(|source| error(source.to_string()))?.as_fd())
    }

    /// The tc object, for attaching by netlink.
    pub fn tc(&mut self) -> &mut Ebpf {
        &mut self.tc
    }

    /// All objects with their names.
    pub fn objects(&mut self) -> [(&'static str, &mut Ebpf); 3] {
        [("xdp", &mut self.xdp), ("tc", &mut self.tc), ("sock", &mut self.sock)]
    }
}

/// How often the ring of decisions is read.
const TRACE_POLL: Duration = Duration::from_millis(20);

/// Where a program's maps come from.
enum Maps<'a> {
    /// From their pins; those that aren't there are made, as large as it says here.
    Pinned(&'a Pins, Generation, &'a [(&'static str, u32)]),
    /// The program's own, as small as a trial allows.
    Small,
}

/// Maps of which a trial needs no more than a few entries, beside those of Services and flows.
const BIG: [&str; 3] = ["AFFINITY", "SOCK_FLOWS", "DEVICES"];

/// Entries in the big maps of a trial.
const TRIAL: u32 = 64;

/// Loads one object.
fn load(name: &str, object: &[u8], maps: &Maps<'_>) -> Result<Ebpf, DatapathError> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| DatapathError::Kernel {
        operation: "load the BPF object",
        object: format!("{name}.o (needs CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON and kernel 5.18 or later)"),
        source,
    };
    let mut loader = EbpfLoader::new();
    match maps {
        Maps::Pinned(pins, generation, sizes) => {
            for map in PINNED {
                loader.map_pin_path(map, pins.map_of(map, *generation));
            }
            for (map, entries) in *sizes {
                loader.map_max_entries(map, *entries);
            }
        }
        Maps::Small => {
            for map in OF_SERVICES.iter().chain(&["LB4_FLOWS", "LB6_FLOWS"]).chain(&BIG) {
                loader.map_max_entries(map, TRIAL);
            }
        }
    }
    let mut ebpf = loader.load(object).map_err(|source| failed(source.into()))?;
    for (_, program) in ebpf.programs_mut() {
        load_program(program).map_err(|source| failed(source.into()))?;
    }
    Ok(ebpf)
}

/// Loads a program. The verifier gives up with `EAGAIN` when a signal is pending (`kernel/bpf/verifier.c: do_check`),
/// which says nothing about the program: libbpf tries five times as well.
pub fn load_program(program: &mut Program) -> Result<(), ProgramError> {
    for _ in 1..LOAD_ATTEMPTS {
        match load_once(program) {
            Err(ProgramError::LoadError { io_error, .. }) if io_error.kind() == ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
    load_once(program)
}

const LOAD_ATTEMPTS: u32 = 5;

fn load_once(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::Xdp(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}
