//! bpf(2) calls on links and pins that aya has for some link types only: one way for all of ours.
//!
//! Layouts are those of `union bpf_attr` (`include/uapi/linux/bpf.h`).

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

const BPF_OBJ_PIN: i64 = 6;
const BPF_OBJ_GET: i64 = 7;
const BPF_OBJ_GET_INFO_BY_FD: i64 = 15;
const BPF_LINK_CREATE: i64 = 28;
const BPF_LINK_UPDATE: i64 = 29;
const BPF_LINK_DETACH: i64 = 34;

/// Where a program goes: values of `enum bpf_attach_type`.
pub mod attach_type {
    #![expect(missing_docs, reason = "the kernel's names")]
    pub const CGROUP_INET4_CONNECT: u32 = 10;
    pub const CGROUP_INET6_CONNECT: u32 = 11;
    pub const CGROUP_UDP4_SENDMSG: u32 = 14;
    pub const CGROUP_UDP6_SENDMSG: u32 = 15;
    pub const CGROUP_UDP4_RECVMSG: u32 = 19;
    pub const CGROUP_UDP6_RECVMSG: u32 = 20;
    pub const CGROUP_INET4_GETPEERNAME: u32 = 29;
    pub const CGROUP_INET6_GETPEERNAME: u32 = 30;
    pub const XDP: u32 = 37;
    pub const TCX_INGRESS: u32 = 46;
    pub const TCX_EGRESS: u32 = 47;
}

/// Room for the largest member of `union bpf_attr` used here.
#[repr(C, align(8))]
struct Attr([u32; 32]);

fn bpf(command: i64, attr: &mut Attr) -> io::Result<i32> {
    // SAFETY: attr is at least as large as the kernel reads for these commands, and zero beyond what is set; pointers in
    // it are valid for the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr.0.as_mut_ptr(), size_of::<Attr>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn attr(words: &[u32]) -> Attr {
    let mut attr = Attr([0; 32]);
    attr.0[..words.len()].copy_from_slice(words);
    attr
}

fn split(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just given it to us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Attaches a program. `target` is an ifindex or the fd of a cgroup directory.
pub fn link_create(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    bpf(BPF_LINK_CREATE, &mut attr(&[program.as_raw_fd() as u32, target, attach_type, flags])).map(owned)
}

/// Puts another program into a link, with no moment in which there is none.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf(BPF_LINK_UPDATE, &mut attr(&[link.as_raw_fd() as u32, program.as_raw_fd() as u32])).map(drop)
}

/// Takes a link off its target at once, whoever else holds it.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(BPF_LINK_DETACH, &mut attr(&[link.as_raw_fd() as u32])).map(drop)
}

/// What a link hangs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    /// `enum bpf_link_type`: 3 cgroup, 6 XDP, 11 TCX.
    pub link_type: u32,
    /// The program.
    pub program_id: u32,
    /// TCX, XDP: the device, 0 if it is gone.
    pub ifindex: u32,
    /// Cgroup: its id.
    pub cgroup_id: u64,
}

/// `BPF_LINK_TYPE_CGROUP`.
pub const LINK_CGROUP: u32 = 3;

/// Asks the kernel about a link.
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = [0u32; 64];
    let [low, high] = split(info.as_mut_ptr() as u64);
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr(&[link.as_raw_fd() as u32, size_of_val(&info) as u32, low, high]))?;
    // type, id, prog_id, padding, then the union; XDP and TCX have the ifindex first, cgroup its id.
    let cgroup_id = u64::from(info[5]) << 32 | u64::from(info[4]);
    Ok(LinkInfo { link_type: info[0], program_id: info[2], ifindex: info[4], cgroup_id })
}

fn path_attr(path: &Path, fd: u32) -> io::Result<(CString, Attr)> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let [low, high] = split(path.as_ptr() as u64);
    Ok((path, attr(&[low, high, fd])))
}

/// Pins an object.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let (_path, mut attr) = path_attr(path, object.as_raw_fd() as u32)?;
    bpf(BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Opens a pinned object.
pub fn get(path: &Path) -> io::Result<OwnedFd> {
    let (_path, mut attr) = path_attr(path, 0)?;
    bpf(BPF_OBJ_GET, &mut attr).map(owned)
}
