//! Servers and clients for network namespaces: small programs whose answers say what really happened.
//!
//! A server answers each line `id` with its own name and the client's address as it sees it, and `get N` with N
//! bytes of a known sequence; a datagram is answered like `id`. At `stray` it sends a segment from beyond the window first.

use std::{
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use lb_test::patience;
use serde_json::json;

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer on TCP and UDP.
    Serve {
        #[arg(long)]
        id: String,
        #[arg(long)]
        listen: Vec<SocketAddr>,
    },
    /// Ask over TCP, each time on a new connection; prints one JSON object a line.
    Tcp {
        target: SocketAddr,
        #[arg(long, default_value_t = 1)]
        count: u32,
        #[arg(long, default_value_t = 2000)]
        timeout_ms: u64,
    },
    /// Ask over UDP.
    Udp {
        target: SocketAddr,
        #[arg(long)]
        connected: bool,
        /// A dual-stack socket, which dials IPv4 by IPv4-mapped addresses.
        #[arg(long)]
        dual_stack: bool,
        /// A new socket for each.
        #[arg(long, default_value_t = 1)]
        count: u32,
        /// Length of the question; more than a packet takes goes out in fragments.
        #[arg(long, default_value_t = 2)]
        bytes: usize,
        #[arg(long, default_value_t = 2000)]
        timeout_ms: u64,
    },
    /// Ask over one UDP socket again and again, whatever becomes of it; prints each answer and error as it comes.
    Talk {
        target: SocketAddr,
        #[arg(long)]
        source_port: u16,
        #[arg(long)]
        connected: bool,
        #[arg(long)]
        secs: f64,
    },
    /// Ask over one TCP connection again and again until it ends; prints each answer and how it ended.
    TalkTcp {
        target: SocketAddr,
        /// Let the server send a segment from beyond the window after the first answer.
        #[arg(long)]
        stray_segment: bool,
        #[arg(long)]
        secs: f64,
    },
    /// Fetch bytes over one TCP connection and check each; `--pause-ms` makes it last.
    Download {
        target: SocketAddr,
        #[arg(long)]
        bytes: u64,
        #[arg(long, default_value_t = 0)]
        pause_ms: u64,
    },
    /// Many connections, and UDP sockets, that ask again and again.
    Load {
        target: SocketAddr,
        #[arg(long, default_value_t = 200)]
        connections: u32,
        #[arg(long, default_value_t = 20)]
        udp: u32,
        /// UDP sockets that talk to one server all the time.
        #[arg(long, default_value_t = 0)]
        udp_streams: u32,
        /// Without it they go on until standard input ends.
        #[arg(long)]
        secs: Option<f64>,
        /// Leave TCP connections with a reset: nobody waits for the last segments.
        #[arg(long)]
        abort: bool,
    },
}

fn main() -> Result<()> {
    match Args::parse().command {
        Command::Serve { id, listen } => serve(&id, &listen),
        Command::Tcp { target, count, timeout_ms } => {
            (0..count).for_each(|_| println!("{}", tcp(target, patience(Duration::from_millis(timeout_ms)))));
            Ok(())
        }
        Command::Udp { target, connected, dual_stack, count, bytes, timeout_ms } => {
            let timeout = patience(Duration::from_millis(timeout_ms));
            let question = vec![b'?'; bytes];
            (0..count).for_each(|_| println!("{}", udp(target, connected, dual_stack, &question, timeout)));
            Ok(())
        }
        Command::Talk { target, source_port, connected, secs } => {
            talk(target, source_port, connected, Duration::from_secs_f64(secs))
        }
        Command::TalkTcp { target, stray_segment, secs } => {
            if let Err(error) = talk_tcp(target, stray_segment, Duration::from_secs_f64(secs)) {
                println!("{}", failure(&error, Instant::now()));
            }
            Ok(())
        }
        Command::Download { target, bytes, pause_ms } => {
            download(target, bytes, Duration::from_millis(pause_ms))
        }
        Command::Load { target, connections, udp, udp_streams, secs, abort } => {
            let clients = Clients { connections, udp, udp_streams, abort };
            println!("{}", load(target, clients, secs.map(Duration::from_secs_f64)));
            Ok(())
        }
    }
}

fn serve(id: &str, listen: &[SocketAddr]) -> Result<()> {
    let mut threads = Vec::new();
    for addr in listen {
        let (tcp, id_tcp) =
            (TcpListener::bind(addr).with_context(|| format!("listen on {addr}"))?, id.to_owned());
        threads.push(thread::spawn(move || {
            for stream in tcp.incoming().flatten() {
                let id = id_tcp.clone();
                thread::spawn(move || answer(&stream, &id));
            }
        }));
        let (udp, id_udp) = (UdpSocket::bind(addr).with_context(|| format!("bind {addr}"))?, id.to_owned());
        threads.push(thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok((_, peer)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(format!("{id_udp} {peer}").as_bytes(), peer);
            }
        }));
    }
    println!("ready");
    threads.into_iter().for_each(|thread| drop(thread.join()));
    Ok(())
}

fn answer(stream: &TcpStream, id: &str) -> Option<()> {
    let peer = stream.peer_addr().ok()?;
    let mut out = stream.try_clone().ok()?;
    for line in BufReader::new(stream).lines() {
        let line = line.ok()?;
        if line == "stray" {
            stray::send(stream).expect("a raw socket, as root");
        }
        match line.strip_prefix("get ") {
            Some(bytes) => send_sequence(&mut out, bytes.parse().ok()?)?,
            None => writeln!(out, "{id} {peer}").ok()?,
        }
    }
    Some(())
}

/// A segment of a connection that its socket never sent (kubernetes issue 74839): its sequence number lies far beyond the
/// window, so that conntrack calls it invalid; a reset that answers it would be believed.
mod stray {
    use std::{
        io,
        net::{Ipv4Addr, SocketAddr, TcpStream},
        os::fd::{AsRawFd, FromRawFd, OwnedFd},
    };

    /// Beyond any window (RFC 7323 §2.3: at most a gigabyte).
    const BEYOND: u32 = 1 << 30;

    /// `TCP_REPAIR_OFF_NO_WP`, `TCP_RECV_QUEUE`, `TCP_SEND_QUEUE` (`include/uapi/linux/tcp.h`).
    const REPAIR_OFF: i32 = -1;
    const RECEIVED: i32 = 1;
    const SENT: i32 = 2;

    pub fn send(stream: &TcpStream) -> io::Result<()> {
        let (from, to) = (stream.local_addr()?, stream.peer_addr()?);
        let (next, expected) = numbers(stream)?;
        let segment = segment(from, to, next.wrapping_add(BEYOND), expected);
        // SAFETY: plain system calls; the address lives through the call, and its length is its own.
        unsafe {
            let raw = libc::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_TCP);
            if raw < 0 {
                return Err(io::Error::last_os_error());
            }
            let raw = OwnedFd::from_raw_fd(raw);
            let mut addr: libc::sockaddr_in = std::mem::zeroed();
            addr.sin_family = libc::AF_INET as u16;
            addr.sin_addr.s_addr = u32::from_ne_bytes(v4(to).octets());
            let len = size_of::<libc::sockaddr_in>() as u32;
            let addr = (&raw const addr).cast();
            match libc::sendto(raw.as_raw_fd(), segment.as_ptr().cast(), segment.len(), 0, addr, len) {
                0.. => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }

    fn v4(addr: SocketAddr) -> Ipv4Addr {
        match addr.ip().to_canonical() {
            std::net::IpAddr::V4(addr) => addr,
            std::net::IpAddr::V6(_) => panic!("IPv4 only"),
        }
    }

    /// The next number this side sends, and the next one it expects.
    fn numbers(stream: &TcpStream) -> io::Result<(u32, u32)> {
        option(stream, libc::TCP_REPAIR, 1)?;
        option(stream, libc::TCP_REPAIR_QUEUE, SENT)?;
        let next = queue_seq(stream)?;
        option(stream, libc::TCP_REPAIR_QUEUE, RECEIVED)?;
        let expected = queue_seq(stream)?;
        option(stream, libc::TCP_REPAIR, REPAIR_OFF)?;
        Ok((next, expected))
    }

    fn option(stream: &TcpStream, name: i32, value: i32) -> io::Result<()> {
        // SAFETY: value is as long as the length says.
        let result = unsafe {
            libc::setsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, name, (&raw const value).cast(), 4)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn queue_seq(stream: &TcpStream) -> io::Result<u32> {
        let (mut value, mut len) = (0u32, 4);
        let out = (&raw mut value).cast();
        // SAFETY: value is as long as the length says.
        let result = unsafe {
            libc::getsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ, out, &raw mut len)
        };
        if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
    }

    /// One byte of data (RFC 9293 §3.1).
    fn segment(from: SocketAddr, to: SocketAddr, sequence: u32, acknowledged: u32) -> Vec<u8> {
        let mut segment = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
        segment.extend(sequence.to_be_bytes());
        segment.extend(acknowledged.to_be_bytes());
        // Five words of header, PSH and ACK, a window; checksum, no urgent pointer, the byte.
        segment.extend([0x50, 0x18, 1, 0, 0, 0, 0, 0, b'!']);
        let mut pseudo = [v4(from).octets(), v4(to).octets()].concat();
        pseudo.extend([0, 6, 0, segment.len() as u8]);
        let words = pseudo.chunks(2).chain(segment.chunks(2));
        let sum: u32 =
            words.map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0))).sum();
        let folded = (sum & 0xffff) + (sum >> 16);
        let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
        segment[16..18].copy_from_slice(&checksum.to_be_bytes());
        segment
    }
}

fn send_sequence(out: &mut TcpStream, bytes: u64) -> Option<()> {
    let mut sequence = Sequence::default();
    let mut left = bytes;
    let mut chunk = vec![0; 64 * 1024];
    while left > 0 {
        let len = chunk.len().min(usize::try_from(left).ok()?);
        chunk[..len].iter_mut().for_each(|byte| *byte = sequence.next());
        out.write_all(&chunk[..len]).ok()?;
        left -= len as u64;
    }
    Some(())
}

/// A known sequence of bytes (xorshift64).
struct Sequence {
    state: u64,
    left: u32,
}

impl Default for Sequence {
    fn default() -> Self {
        Self { state: 0x9e37_79b9_7f4a_7c15, left: 0 }
    }
}

impl Sequence {
    fn next(&mut self) -> u8 {
        if self.left == 0 {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            self.left = 8;
        }
        self.left -= 1;
        (self.state >> (8 * self.left)) as u8
    }
}

fn failure(error: &std::io::Error, started: Instant) -> serde_json::Value {
    let kind = match error.kind() {
        _ if error.raw_os_error() == Some(libc::EDESTADDRREQ) => "unconnected",
        ErrorKind::ConnectionRefused => "refused",
        ErrorKind::TimedOut | ErrorKind::WouldBlock => "timeout",
        ErrorKind::ConnectionReset => "reset",
        ErrorKind::ConnectionAborted => "aborted",
        ErrorKind::PermissionDenied => "denied",
        _ => "other",
    };
    json!({ "error": kind, "text": error.to_string(), "ms": started.elapsed().as_millis() as u64 })
}

fn success(text: &str, peer: SocketAddr, started: Instant) -> serde_json::Value {
    let (id, client) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
    let client: Option<SocketAddr> = client.parse().ok();
    let ip = client.map(|client| client.ip().to_canonical().to_string());
    json!({ "id": id, "client": ip, "peer": peer.to_string(), "ms": started.elapsed().as_millis() as u64 })
}

fn tcp(target: SocketAddr, timeout: Duration) -> serde_json::Value {
    let started = Instant::now();
    let ask = || -> std::io::Result<(String, SocketAddr)> {
        let mut stream = TcpStream::connect_timeout(&target, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.write_all(b"id\n")?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        Ok((line, stream.peer_addr()?))
    };
    match ask() {
        Ok((line, peer)) => success(&line, peer, started),
        Err(error) => failure(&error, started),
    }
}

fn udp(
    target: SocketAddr,
    connected: bool,
    dual_stack: bool,
    question: &[u8],
    timeout: Duration,
) -> serde_json::Value {
    let started = Instant::now();
    let ask = || -> std::io::Result<(String, SocketAddr)> {
        let local: SocketAddr =
            if target.is_ipv4() && !dual_stack { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
        let target = match target {
            SocketAddr::V4(v4) if dual_stack => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
            other => other,
        };
        let socket = UdpSocket::bind(local)?;
        socket.set_read_timeout(Some(timeout))?;
        let mut buffer = [0; 2048];
        let (len, peer) = if connected {
            socket.connect(target)?;
            socket.send(question)?;
            (socket.recv(&mut buffer)?, socket.peer_addr()?)
        } else {
            socket.send_to(question, target)?;
            socket.recv_from(&mut buffer)?
        };
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        Ok((String::from_utf8_lossy(&buffer[..len]).into_owned(), peer))
    };
    match ask() {
        Ok((text, peer)) => success(&text, peer, started),
        Err(error) => failure(&error, started),
    }
}

/// Between two questions of one who talks.
const TALK_PAUSE: Duration = Duration::from_millis(50);

/// How long one who talks waits for an answer; a busy machine needs some of it.
const TALK_ANSWER: Duration = Duration::from_millis(250);

/// Prints at once, for whoever reads along.
fn tell(line: &serde_json::Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

fn talk(target: SocketAddr, source_port: u16, connected: bool, duration: Duration) -> Result<()> {
    let any: SocketAddr =
        if target.is_ipv4() { ([0; 4], source_port).into() } else { ([0u16; 8], source_port).into() };
    let socket = UdpSocket::bind(any).with_context(|| format!("bind {any}"))?;
    if connected {
        socket.connect(target)?;
    }
    socket.set_read_timeout(Some(patience(TALK_ANSWER)))?;
    let mut buffer = [0; 2048];
    let deadline = Instant::now() + duration;
    while Instant::now() < deadline {
        let started = Instant::now();
        let sent = if connected { socket.send(b"id") } else { socket.send_to(b"id", target) };
        let answer = sent.and_then(|_| socket.recv_from(&mut buffer));
        tell(&match answer {
            Ok((len, peer)) => success(
                &String::from_utf8_lossy(&buffer[..len]),
                SocketAddr::new(peer.ip().to_canonical(), peer.port()),
                started,
            ),
            Err(error) => failure(&error, started),
        })?;
        thread::sleep(TALK_PAUSE.saturating_sub(started.elapsed()));
    }
    Ok(())
}

fn talk_tcp(target: SocketAddr, stray_segment: bool, duration: Duration) -> std::io::Result<()> {
    let patience = patience(Duration::from_secs(5));
    let mut stream = TcpStream::connect_timeout(&target, patience)?;
    stream.set_read_timeout(Some(patience))?;
    let mut lines = BufReader::new(stream.try_clone()?);
    let deadline = Instant::now() + duration;
    let mut strays = u32::from(stray_segment);
    while Instant::now() < deadline {
        let started = Instant::now();
        let mut line = String::new();
        stream.write_all(b"id\n")?;
        if lines.read_line(&mut line)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let _ = tell(&success(&line, target, started));
        if strays > 0 {
            strays -= 1;
            stream.write_all(b"stray\n")?;
            lines.read_line(&mut String::new())?;
        }
        thread::sleep(TALK_PAUSE);
    }
    Ok(())
}

fn download(target: SocketAddr, bytes: u64, pause: Duration) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&target, patience(Duration::from_secs(5)))?;
    stream.set_read_timeout(Some(patience(Duration::from_secs(20))))?;
    writeln!(stream, "get {bytes}")?;
    let (mut sequence, mut got) = (Sequence::default(), 0u64);
    let mut chunk = vec![0; 64 * 1024];
    while got < bytes {
        let len = stream.read(&mut chunk)?;
        if len == 0 {
            bail!("ended after {got} of {bytes} bytes");
        }
        for (i, byte) in chunk[..len].iter().enumerate() {
            if *byte != sequence.next() {
                bail!("byte {} is wrong", got + i as u64);
            }
        }
        got += len as u64;
        thread::sleep(pause);
    }
    println!("{}", json!({ "bytes": got }));
    Ok(())
}

#[derive(Default)]
struct Counts {
    requests: AtomicU64,
    udp_requests: AtomicU64,
    resets: AtomicU64,
    timeouts: AtomicU64,
    wrong: AtomicU64,
    udp_lost: AtomicU64,
}

struct Clients {
    connections: u32,
    udp: u32,
    udp_streams: u32,
    abort: bool,
}

fn load(target: SocketAddr, clients: Clients, duration: Option<Duration>) -> serde_json::Value {
    let Clients { connections, udp, udp_streams, abort } = clients;
    let counts = Arc::new(Counts::default());
    let over = Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    for _ in 0..connections {
        let (counts, over) = (counts.clone(), over.clone());
        threads.push(thread::spawn(move || load_tcp(target, &counts, &over, abort)));
    }
    for _ in 0..udp {
        let (counts, over) = (counts.clone(), over.clone());
        threads.push(thread::spawn(move || load_udp(target, &counts, &over)));
    }
    for _ in 0..udp_streams {
        let (counts, over) = (counts.clone(), over.clone());
        threads.push(thread::spawn(move || load_udp_stream(target, &counts, &over)));
    }
    match duration {
        Some(duration) => thread::sleep(duration),
        None => drop(std::io::copy(&mut std::io::stdin(), &mut std::io::sink())),
    }
    over.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|thread| drop(thread.join()));
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    json!({
        "requests": get(&counts.requests), "udp_requests": get(&counts.udp_requests), "resets": get(&counts.resets),
        "timeouts": get(&counts.timeouts), "wrong": get(&counts.wrong), "udp_lost": get(&counts.udp_lost),
    })
}

/// One connection for the whole time; its answers must always come from the same server.
fn load_tcp(target: SocketAddr, counts: &Counts, over: &AtomicBool, abort: bool) {
    let talk = || -> std::io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&target, patience(Duration::from_secs(10)))?;
        stream.set_read_timeout(Some(patience(Duration::from_secs(10))))?;
        let mut lines = BufReader::new(stream.try_clone()?);
        let mut first = String::new();
        while !over.load(Ordering::Relaxed) {
            stream.write_all(b"id\n")?;
            let mut line = String::new();
            lines.read_line(&mut line)?;
            counts.requests.fetch_add(1, Ordering::Relaxed);
            if first.is_empty() {
                first.clone_from(&line);
            }
            if line != first || line.is_empty() {
                counts.wrong.fetch_add(1, Ordering::Relaxed);
            }
            thread::sleep(Duration::from_millis(50));
        }
        if abort { close_with_reset(stream) } else { Ok(()) }
    };
    if let Err(error) = talk() {
        let timed_out = matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock);
        let counter = if timed_out { &counts.timeouts } else { &counts.resets };
        counter.fetch_add(1, Ordering::Relaxed);
        eprintln!("{target}: {error}");
    }
}

/// Closing a socket that must not linger sends a reset (socket(7), SO_LINGER).
fn close_with_reset(stream: TcpStream) -> std::io::Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: linger is as long as the length says, and lives through the call.
    let result = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of::<libc::linger>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// A new socket for each question; the answer must come from where it was sent.
fn load_udp(target: SocketAddr, counts: &Counts, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let answer = udp(target, false, false, b"id", patience(Duration::from_secs(5)));
        counts.udp_requests.fetch_add(1, Ordering::Relaxed);
        if answer.get("error").is_some() {
            counts.udp_lost.fetch_add(1, Ordering::Relaxed);
            eprintln!("{target}: {answer}");
        } else if answer["peer"] != target.to_string() {
            counts.wrong.fetch_add(1, Ordering::Relaxed);
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// One connected socket for the whole time; its answers must always come from the same server.
fn load_udp_stream(target: SocketAddr, counts: &Counts, over: &AtomicBool) {
    let talk = || -> std::io::Result<()> {
        let any: SocketAddr = if target.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
        let socket = UdpSocket::bind(any)?;
        socket.connect(target)?;
        socket.set_read_timeout(Some(patience(Duration::from_secs(5))))?;
        let (mut first, mut buffer) = (Vec::new(), [0; 2048]);
        while !over.load(Ordering::Relaxed) {
            socket.send(b"id")?;
            let len = socket.recv(&mut buffer)?;
            counts.udp_requests.fetch_add(1, Ordering::Relaxed);
            if first.is_empty() {
                first = buffer[..len].to_vec();
            }
            if first != buffer[..len] {
                counts.wrong.fetch_add(1, Ordering::Relaxed);
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    };
    if let Err(error) = talk() {
        counts.udp_lost.fetch_add(1, Ordering::Relaxed);
        eprintln!("{target}: {error}");
    }
}
