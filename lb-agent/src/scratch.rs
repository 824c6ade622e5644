//! A network namespace of our own, where programs and rules can be tried and read back: the machine's stays as it is.

use std::{fs::File, io, os::fd::AsRawFd, panic::resume_unwind, thread};

/// The namespace; it is gone with the value.
pub struct Scratch {
    namespace: File,
}

impl Scratch {
    /// Makes one, with a loopback device that is down and no rules. Needs `CAP_SYS_ADMIN`.
    pub fn new() -> io::Result<Self> {
        let make = || {
            // SAFETY: moves this thread alone, which ends here.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self { namespace: File::open("/proc/thread-self/ns/net")? })
        };
        thread::scope(|scope| scope.spawn(make).join()).unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Works inside, on a thread of its own: system calls of that thread and the programs it starts see this
    /// namespace.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        within(&self.namespace, work)
    }
}

/// Works inside a network namespace, on a thread of its own. Needs `CAP_SYS_ADMIN`.
pub fn within<T: Send>(namespace: &File, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let enter = || {
        // SAFETY: moves this thread alone, which ends here.
        if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(work())
    };
    thread::scope(|scope| scope.spawn(enter).join()).unwrap_or_else(|panic| resume_unwind(panic))
}
