//! Network namespaces as test hosts: made here, removed here, whatever happens in between.
//!
//! Commands enter a namespace by `nsenter --net=`: `ip netns exec` would remount /sys and hide bpffs and cgroups.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, anyhow, bail};
use aya::{
    Ebpf,
    programs::{ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode},
};

/// Everything one test owns: namespaces, processes, cgroups, pins and files, all named after its process.
pub struct Lab {
    name: String,
    namespaces: Vec<String>,
    children: Vec<Child>,
    keep: bool,
    /// Programs on devices; closing them takes them off.
    attached: Vec<Ebpf>,
}

static LABS: AtomicU32 = AtomicU32::new(0);

/// All labs' names begin so, then comes the process id.
const PREFIX: &str = "lbt";
const BPFFS: &str = "/sys/fs/bpf";

impl Lab {
    /// An empty lab. Needs root. Labs of dead processes are removed first.
    pub fn new() -> Result<Self> {
        sweep(|pid| !Path::new(&format!("/proc/{pid}")).exists());
        let name = format!("{PREFIX}{}x{}", std::process::id(), LABS.fetch_add(1, Ordering::Relaxed));
        let lab =
            Self { name, namespaces: Vec::new(), children: Vec::new(), keep: false, attached: Vec::new() };
        fs::create_dir_all(lab.dir()).context("make the lab's folder")?;
        fs::create_dir_all(lab.cgroup("base"))
            .context("make the lab's cgroup: is cgroup v2 mounted, are we root?")?;
        Ok(lab)
    }

    /// Leaves everything up when dropped; [`sweep_all`] removes it.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// A folder for files.
    pub fn dir(&self) -> PathBuf {
        std::env::temp_dir().join(&self.name)
    }

    /// The pins of one node.
    pub fn bpf_root(&self, node: &str) -> PathBuf {
        Path::new(BPFFS).join(&self.name).join(node)
    }

    /// A cgroup of this lab.
    pub fn cgroup(&self, path: &str) -> PathBuf {
        cgroup_root().join(&self.name).join(path)
    }

    /// The full name of a namespace.
    pub fn ns(&self, name: &str) -> String {
        format!("{}-{name}", self.name)
    }

    /// Where a namespace can be opened.
    pub fn ns_path(&self, name: &str) -> PathBuf {
        Path::new("/run/netns").join(self.ns(name))
    }

    /// Makes a namespace with loopback up.
    pub fn add_ns(&mut self, name: &str) -> Result<()> {
        let full = self.ns(name);
        run(Command::new("ip").args(["netns", "add", &full]))?;
        self.namespaces.push(full);
        self.ip(name, "link set lo up")?;
        self.sysctl(name, "net.ipv6.conf.all.accept_dad", "0")?;
        self.sysctl(name, "net.ipv6.conf.default.accept_dad", "0")
    }

    /// Runs `ip` in a namespace; words are separated by spaces.
    pub fn ip(&self, ns: &str, words: &str) -> Result<()> {
        run(Command::new("ip").args(["-n", &self.ns(ns)]).args(words.split_whitespace()))
    }

    /// Sets a sysctl of a namespace.
    pub fn sysctl(&self, ns: &str, name: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        run(self.command(ns, "sh").args(["-c", &format!("echo {value} > {path}")]))
    }

    /// A veth pair: one end in each namespace.
    pub fn veth(&self, (a, a_dev): (&str, &str), (b, b_dev): (&str, &str)) -> Result<()> {
        let peer_ns = self.ns(b);
        self.ip(a, &format!("link add {a_dev} type veth peer name {b_dev} netns {peer_ns}"))?;
        self.ip(a, &format!("link set {a_dev} up"))?;
        self.ip(b, &format!("link set {b_dev} up"))
    }

    /// Switches offloads of a device on or off.
    pub fn offloads(&self, ns: &str, device: &str, on: bool) -> Result<()> {
        let state = if on { "on" } else { "off" };
        run(self
            .command(ns, "ethtool")
            .args(["-K", device, "tx", state, "rx", state, "gso", state, "gro", state, "tso", state]))
    }

    /// The programs on a device's tc hooks, as `tcx NAME` (both sides) and what bpftool says of clsact: Debian's bpftool
    /// knows nothing of TCX.
    pub fn tc_programs(&self, ns: &str, device: &str) -> Result<Vec<String>> {
        let shown = output(self.command(ns, "bpftool").args(["net", "show", "dev", device]))?;
        let clsact = shown.lines().filter(|line| line.contains("clsact/")).map(ToString::to_string);
        let mut programs: Vec<String> = clsact.collect();
        programs.extend(self.inside(ns, || {
            let mut names = Vec::new();
            for side in [TcAttachType::Ingress, TcAttachType::Egress] {
                let found = match SchedClassifier::query_tcx(device, side) {
                    Ok((_, found)) => found,
                    // Before Linux 6.6 there is no TCX to ask about.
                    Err(ProgramError::SyscallError(error))
                        if error.io_error.raw_os_error() == Some(libc::EINVAL) =>
                    {
                        return Ok(names);
                    }
                    Err(error) => return Err(error.into()),
                };
                names.extend(found.iter().map(|info| format!("tcx {}", info.name_as_str().unwrap_or("?"))));
            }
            Ok(names)
        })?);
        Ok(programs)
    }

    /// Puts an XDP program on a device that passes everything: without one the kernel leaves frames that the other side
    /// of a veth sends by `XDP_TX` in the queue (`drivers/net/veth.c: veth_xdp_flush`).
    pub fn take_xdp_frames(&mut self, ns: &str, device: &str) -> Result<()> {
        let object = "bench.o";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bpf").join(object);
        let mut ebpf = Ebpf::load_file(&path).with_context(|| format!("load {}", path.display()))?;
        self.inside(ns, || {
            let program: &mut Xdp = ebpf.program_mut("bench_pass").context("bench_pass")?.try_into()?;
            program.load()?;
            program.attach(device, XdpMode::Driver).with_context(|| format!("attach to {device}"))?;
            Ok(())
        })?;
        self.attached.push(ebpf);
        Ok(())
    }

    /// Runs on a thread of its own, inside a namespace.
    pub fn inside<T: Send>(&self, ns: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let ns = fs::File::open(self.ns_path(ns)).context("open the namespace")?;
        let enter = || {
            // SAFETY: moves this thread alone, into a namespace that lives as long as the lab.
            if unsafe { libc::setns(ns.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                bail!("enter the namespace: {}", std::io::Error::last_os_error());
            }
            work()
        };
        let done = std::thread::scope(|scope| scope.spawn(enter).join());
        done.map_err(|_| anyhow!("the thread inside the namespace panicked"))?
    }

    /// A command in a namespace.
    pub fn command(&self, ns: &str, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.ns(ns))).arg("--").arg(program);
        command
    }

    /// A command in a namespace and a cgroup of this lab, which is made if need be.
    pub fn command_in(&self, ns: &str, cgroup: &str, program: &str) -> Result<Command> {
        let dir = self.cgroup(cgroup);
        fs::create_dir_all(&dir).with_context(|| format!("make cgroup {}", dir.display()))?;
        let mut command = Command::new("sh");
        command
            .args([
                "-c",
                "echo $$ > \"$0/cgroup.procs\" && ns=$1 && shift && exec nsenter --net=\"$ns\" -- \"$@\"",
            ])
            .arg(dir)
            .arg(format!("/run/netns/{}", self.ns(ns)))
            .arg(program);
        Ok(command)
    }

    /// Starts a process that ends with the lab, and waits for its first line.
    pub fn start(&mut self, mut command: Command) -> Result<()> {
        let line = line_of(&command);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {line}"))?;
        let mut first = String::new();
        let stdout = child.stdout.take().context("piped above")?;
        BufReader::new(stdout).read_line(&mut first)?;
        self.children.push(child);
        if first.trim() != "ready" {
            bail!("{line}: said {first:?} instead of ready");
        }
        Ok(())
    }

    /// Hands a process over, to be ended with the lab.
    pub fn adopt(&mut self, child: Child) {
        self.children.push(child);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        remove(&self.name);
    }
}

fn cgroup_root() -> PathBuf {
    let unified = Path::new("/sys/fs/cgroup/unified");
    if unified.is_dir() { unified.to_owned() } else { PathBuf::from("/sys/fs/cgroup") }
}

/// Removes all labs, of live processes too.
pub fn sweep_all() {
    sweep(|_| true);
}

fn sweep(dead: impl Fn(u32) -> bool) {
    let folders = [PathBuf::from("/run/netns"), PathBuf::from(BPFFS), cgroup_root(), std::env::temp_dir()];
    let mut labs: Vec<String> = folders
        .iter()
        .flat_map(|folder| fs::read_dir(folder).into_iter().flatten().flatten())
        .filter_map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let lab = name.split('-').next()?.to_owned();
            let (pid, number) = lab.strip_prefix(PREFIX)?.split_once('x')?;
            number.parse::<u32>().ok()?;
            dead(pid.parse().ok()?).then_some(lab)
        })
        .collect();
    labs.sort();
    labs.dedup();
    labs.iter().for_each(|lab| remove(lab));
}

/// Removes a lab by name: its processes, namespaces, pins, cgroups and files.
fn remove(lab: &str) {
    let cgroups = cgroup_root().join(lab);
    // Processes first: those in the lab's cgroups are the lab's own.
    for dir in folders_below(&cgroups) {
        let pids = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        for pid in pids.lines().filter_map(|pid| pid.parse().ok()) {
            // SAFETY: a plain system call.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&format!("{lab}-")) {
            let _ = run(Command::new("ip").args(["netns", "del", &name]));
        }
    }
    let pins = Path::new(BPFFS).join(lab);
    for dir in folders_below(&pins) {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let _ = fs::remove_file(entry.path());
        }
        let _ = fs::remove_dir(dir);
    }
    for _ in 0..50 {
        folders_below(&cgroups).iter().for_each(|dir| drop(fs::remove_dir(dir)));
        if !cgroups.exists() {
            break;
        }
        // The kernel takes a moment to bury killed processes.
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    for entry in fs::read_dir("/run/lb").into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().contains(&format!("-{lab}-")) {
            let _ = fs::remove_file(entry.path());
        }
    }
    let _ = fs::remove_dir_all(std::env::temp_dir().join(lab));
}

/// A folder and all below it, the deepest first.
fn folders_below(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    if root.is_dir() {
        for entry in fs::read_dir(root).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.extend(folders_below(&entry.path()));
            }
        }
        found.push(root.to_owned());
    }
    found
}

/// Runs a command, quietly unless it fails.
pub fn run(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// Runs a command and returns what it prints.
pub fn output(command: &mut Command) -> Result<String> {
    let line = line_of(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {line}"))?;
    if !output.status.success() {
        bail!("{line}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn line_of(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
    words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
