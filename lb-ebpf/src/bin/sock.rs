//! Socket hooks on the cgroup tree: pods' and the host's sockets → any frontend.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod program {
    use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
    use lb_ebpf::sock;

    #[cgroup_sock_addr(connect4)]
    pub fn lb_connect4(ctx: SockAddrContext) -> i32 {
        sock::connect4(&ctx)
    }

    #[cgroup_sock_addr(connect6)]
    pub fn lb_connect6(ctx: SockAddrContext) -> i32 {
        sock::connect6(&ctx)
    }

    #[cgroup_sock_addr(sendmsg4)]
    pub fn lb_sendmsg4(ctx: SockAddrContext) -> i32 {
        sock::sendmsg4(&ctx)
    }

    #[cgroup_sock_addr(sendmsg6)]
    pub fn lb_sendmsg6(ctx: SockAddrContext) -> i32 {
        sock::sendmsg6(&ctx)
    }

    #[cgroup_sock_addr(recvmsg4)]
    pub fn lb_recvmsg4(ctx: SockAddrContext) -> i32 {
        sock::recvmsg4(&ctx)
    }

    #[cgroup_sock_addr(recvmsg6)]
    pub fn lb_recvmsg6(ctx: SockAddrContext) -> i32 {
        sock::recvmsg6(&ctx)
    }

    #[cgroup_sock_addr(getpeername4)]
    pub fn lb_getpeername4(ctx: SockAddrContext) -> i32 {
        sock::getpeername4(&ctx)
    }

    #[cgroup_sock_addr(getpeername6)]
    pub fn lb_getpeername6(ctx: SockAddrContext) -> i32 {
        sock::getpeername6(&ctx)
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
