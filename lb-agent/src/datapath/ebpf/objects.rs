//! The BPF objects, embedded at build time from `target/bpf` (or `$LB_BPF_DIR`).

use aya::include_bytes_aligned;

use crate::datapath::DatapathError;

/// XDP, tc and socket programs.
#[derive(Clone, Copy)]
pub struct Objects {
    /// `lb_xdp`.
    pub xdp: &'static [u8],
    /// `lb_netdev_in` and the others.
    pub tc: &'static [u8],
    /// `lb_connect4` and the others.
    pub sock: &'static [u8],
}

/// The normal build, without any logging.
pub const NORMAL: Objects = Objects {
    xdp: include_bytes_aligned!(concat!(env!("OUT_DIR"), "/xdp.o")),
    tc: include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tc.o")),
    sock: include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sock.o")),
};

/// The build that logs each packet's decisions.
pub const TRACE: Objects = Objects {
    xdp: include_bytes_aligned!(concat!(env!("OUT_DIR"), "/trace-xdp.o")),
    tc: include_bytes_aligned!(concat!(env!("OUT_DIR"), "/trace-tc.o")),
    sock: NORMAL.sock,
};

impl Objects {
    /// Fails, with the way out, if the agent was built before its objects.
    pub fn check(&self) -> Result<(), DatapathError> {
        if self.xdp.is_empty() || self.tc.is_empty() || self.sock.is_empty() {
            return Err(DatapathError::Kernel {
                operation: "find",
                object: "the BPF objects".into(),
                source: "this binary was built without them: run `cargo xtask build-ebpf`, then build again"
                    .into(),
            });
        }
        Ok(())
    }
}
