//! Loads the programs; maps are taken from their pins, or made and pinned.

use std::{
    io::ErrorKind,
    os::fd::{AsFd, BorrowedFd},
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{Program, ProgramError},
};

use super::{
    maps::{PINNED, Pins},
    objects::Objects,
};
use crate::datapath::DatapathError;

/// Loaded programs, by object.
pub struct Programs {
    xdp: Ebpf,
    tc: Ebpf,
    sock: Ebpf,
}

/// Sizes that the operator can set. A pinned map keeps the size it was made with.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Entries in each flow table (two per connection).
    pub flows: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { flows: 262_144 }
    }
}

impl Programs {
    /// Loads all programs of `objects`.
    pub fn load(pins: &Pins, objects: &Objects, sizes: Sizes) -> Result<Self, DatapathError> {
        pins.create()?;
        Ok(Self {
            xdp: load(Some(pins), "xdp", objects.xdp, sizes)?,
            tc: load(Some(pins), "tc", objects.tc, sizes)?,
            sock: load(Some(pins), "sock", objects.sock, sizes)?,
        })
    }

    /// Loads all programs with small maps of their own: does this kernel take them? Nothing is pinned.
    pub fn trial(objects: &Objects) -> Result<Self, DatapathError> {
        objects.check()?;
        let sizes = Sizes { flows: TRIAL };
        Ok(Self {
            xdp: load(None, "xdp", objects.xdp, sizes)?,
            tc: load(None, "tc", objects.tc, sizes)?,
            sock: load(None, "sock", objects.sock, sizes)?,
        })
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

/// Maps of which a trial needs no more than a few entries.
const BIG: [&str; 12] = [
    "LB4_FRONTENDS",
    "LB6_FRONTENDS",
    "LB4_VIPS",
    "LB6_VIPS",
    "SLOTS",
    "LB4_BACKENDS",
    "LB6_BACKENDS",
    "LB4_FLOWS",
    "LB6_FLOWS",
    "AFFINITY",
    "SOCK_FLOWS",
    "DEVICES",
];

/// Entries in the big maps of a trial.
const TRIAL: u32 = 64;

/// Loads one object; without pins its maps are its own, and small.
fn load(pins: Option<&Pins>, name: &str, object: &[u8], sizes: Sizes) -> Result<Ebpf, DatapathError> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| DatapathError::Kernel {
        operation: "load the BPF object",
        object: format!("{name}.o (needs CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON and kernel 5.18 or later)"),
        source,
    };
    let mut loader = EbpfLoader::new();
    for map in PINNED {
        match pins {
            Some(pins) => drop(loader.map_pin_path(map, pins.map(map))),
            None if BIG.contains(&map) => drop(loader.map_max_entries(map, TRIAL)),
            None => {}
        }
    }
    loader.map_max_entries("LB4_FLOWS", sizes.flows);
    loader.map_max_entries("LB6_FLOWS", sizes.flows);
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
