//! The test VM: Debian's kernels in qemu, with this machine's files below a layer in memory.
//!
//! qemu emulates (TCG), so that it works wherever this runs; KVM inside a VM may open and then hang. qemu and the
//! kernels are unpacked below `target/vm`, not installed: a distribution's qemu may conflict with what is there.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::cargo::{self, is_root, show};

/// What the first process needs before it has the host's files.
const MODULES: [&str; 3] = ["virtio_pci", "virtiofs", "overlay"];

const INIT: &str = include_str!("../vm/init.sh");

/// An unpacked kernel package.
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    dir: PathBuf,
}

/// Why there can be no VM here.
pub fn obstacle() -> Option<&'static str> {
    if !cfg!(target_arch = "x86_64") {
        Some("the test VM is an x86-64 one")
    } else if !Path::new("/etc/debian_version").exists() {
        Some("its kernels come from Debian's archive by apt-get, which is not here")
    } else if !is_root() {
        Some("it needs root")
    } else {
        None
    }
}

/// Fetches what is missing: qemu, a static busybox, and the kernel that a package depends on (its name stays, its
/// kernel's changes with each build). No kernel if Debian's release here has none.
pub fn fetch(package: &str) -> Result<Option<Kernel>> {
    let tools = dir().join("tools");
    if !tools.exists() {
        eprintln!("fetching qemu into {} (about 20 MB)", tools.display());
        show(Command::new("apt-get").args(["update", "-qq"]))?;
        unpack(&tool_packages()?, &tools)?;
    }
    let unpacked = dir().join(package);
    if !unpacked.exists() {
        // The package has no files; it depends on the one that has.
        let depends = output(Command::new("apt-cache").args(["depends", package])).unwrap_or_default();
        let image = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
        let Some(release) = image else { return Ok(None) };
        eprintln!("fetching kernel {release} into {} (about 30 MB)", unpacked.display());
        unpack(&[format!("linux-image-{release}")], &unpacked)?;
    }
    let release = fs::read_dir(unpacked.join("lib/modules"))?.flatten().next();
    let release = release.context("a kernel package has modules")?.file_name().to_string_lossy().into_owned();
    if !unpacked.join("lib/modules").join(&release).join("modules.dep.bin").exists() {
        show(Command::new("depmod").arg("-b").arg(&unpacked).arg(&release))?;
    }
    Ok(Some(Kernel { release, dir: unpacked }))
}

/// Boots a kernel, runs a shell script in it as root, hands on each line it prints, and returns its exit code.
pub fn boot(kernel: &Kernel, script: &str, limit: Duration, mut line: impl FnMut(&str)) -> Result<i32> {
    sweep()?;
    let run = dir().join(format!("run-{}", std::process::id()));
    fs::create_dir_all(&run)?;
    let initrd = initrd(kernel, script, &run)?;
    let socket = run.join("host.sock");
    let _host = serve_host(&run, &socket)?;
    let (console, code) = (run.join("console"), run.join("code"));
    let started = Instant::now();
    let mut qemu = tool("usr/bin/qemu-system-x86_64");
    qemu.arg("-L").arg(dir().join("tools/usr/share/qemu"));
    qemu.arg("-L").arg(dir().join("tools/usr/share/seabios"));
    qemu.args(["-accel", "tcg", "-cpu", "max", "-m", "3072", "-smp", "2"]);
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    qemu.args(["-object", "memory-backend-memfd,id=mem,size=3072M,share=on", "-numa", "node,memdev=mem"]);
    qemu.args(["-chardev", &format!("socket,id=host,path={}", socket.display())]);
    qemu.args(["-device", "vhost-user-fs-pci,chardev=host,tag=host"]);
    qemu.args(["-serial", &format!("file:{}", console.display()), "-serial", "stdio"]);
    qemu.args(["-serial", &format!("file:{}", code.display())]);
    qemu.arg("-kernel").arg(kernel.dir.join(format!("boot/vmlinuz-{}", kernel.release)));
    qemu.arg("-initrd").arg(initrd);
    qemu.args(["-append", "console=ttyS0 panic=-1 quiet mitigations=off"]);
    // qemu ends at the limit, and with it the lines.
    let mut limited = Command::new("timeout");
    limited.arg("--foreground").arg(limit.as_secs().to_string());
    limited.arg(qemu.get_program()).args(qemu.get_args());
    limited.envs(qemu.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let errors = fs::File::create(run.join("qemu"))?;
    let child = limited.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors).spawn();
    let mut child = Ended(child.context("start timeout (package coreutils)")?);
    for text in BufReader::new(child.0.stdout.take().context("piped")?).split(b'\n') {
        line(String::from_utf8_lossy(&text?).trim_end_matches('\r'));
    }
    child.0.wait()?;
    let code = fs::read_to_string(code).unwrap_or_default().trim().parse();
    let Ok(code) = code else {
        let said = [console, run.join("qemu")].map(|file| tail(&file)).concat();
        let after = started.elapsed().as_secs();
        bail!(
            "kernel {}: the VM ended after {after} s (limit {limit:?}) before its job did:\n{said}",
            kernel.release
        );
    };
    fs::remove_dir_all(run)?;
    Ok(code)
}

/// Removes what runs left that were killed, or failed, which keeps their logs until now.
fn sweep() -> Result<()> {
    for entry in fs::read_dir(dir())?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let dead =
            |pid: &str| pid == std::process::id().to_string() || !Path::new("/proc").join(pid).exists();
        if name.strip_prefix("run-").is_some_and(dead) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// Where all of it lies.
fn dir() -> PathBuf {
    cargo::root().join("target/vm")
}

/// Packages to unpack: those apt would install for qemu, and more that this release may have or not.
fn tool_packages() -> Result<Vec<String>> {
    let wanted: Vec<&str> = ["qemu-system-x86", "busybox-static", "virtiofsd"]
        .into_iter()
        .filter(|name| output(Command::new("apt-cache").args(["show", name])).is_ok())
        .collect();
    let plan =
        output(Command::new("apt-get").args(["install", "-s", "--no-install-recommends"]).args(&wanted))?;
    let planned = plan.lines().filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next());
    let mut packages: Vec<String> = planned.map(str::to_owned).collect();
    packages.extend(wanted.iter().map(ToString::to_string));
    packages.sort();
    packages.dedup();
    Ok(packages)
}

/// Downloads packages and unpacks them; the folder is there when all are.
fn unpack(packages: &[String], to: &Path) -> Result<()> {
    let (debs, draft) = (dir().join("debs"), to.with_extension("new"));
    for folder in [&debs, &draft] {
        let _ = fs::remove_dir_all(folder);
        fs::create_dir_all(folder)?;
    }
    let mut download = Command::new("apt-get");
    download.args(["download", "-qq", "-o", "APT::Sandbox::User=root"]).args(packages);
    show(download.current_dir(&debs))?;
    for deb in fs::read_dir(&debs)?.flatten() {
        output(Command::new("dpkg").arg("-x").arg(deb.path()).arg(&draft))?;
    }
    fs::remove_dir_all(debs)?;
    fs::rename(&draft, to).with_context(|| format!("rename {}", draft.display()))
}

/// A program of the unpacked packages, with their libraries.
fn tool(path: &str) -> Command {
    let tools = dir().join("tools");
    let mut command = Command::new(tools.join(path));
    let libraries = ["usr/lib", "lib"].map(|lib| format!("{}/{lib}/x86_64-linux-gnu", tools.display()));
    command.env("LD_LIBRARY_PATH", libraries.join(":"));
    command
}

fn first_of(paths: &[&str]) -> Result<String> {
    let found = paths.iter().find(|path| dir().join("tools").join(path).exists());
    let missing =
        || format!("{}: none of {}; remove the folder and try again", dir().display(), paths.join(", "));
    found.map(ToString::to_string).with_context(missing)
}

/// The first file system: busybox, the modules for the host's files, and the job.
fn initrd(kernel: &Kernel, script: &str, run: &Path) -> Result<PathBuf> {
    let root = run.join("initrd");
    fs::create_dir_all(root.join("bin"))?;
    fs::create_dir_all(root.join("modules"))?;
    let busybox = dir().join("tools").join(first_of(&["bin/busybox", "usr/bin/busybox"])?);
    fs::copy(&busybox, root.join("bin/busybox"))?;
    let mut loaded: Vec<PathBuf> = Vec::new();
    for module in MODULES {
        let mut modprobe = Command::new("modprobe");
        modprobe.arg("-d").arg(&kernel.dir).args(["-S", &kernel.release, "--show-depends", module]);
        for path in output(&mut modprobe)?.lines().filter_map(|line| line.strip_prefix("insmod ")) {
            let path = PathBuf::from(path.trim());
            if !loaded.contains(&path) {
                loaded.push(path);
            }
        }
    }
    for (number, path) in loaded.iter().enumerate() {
        let to = root.join(format!("modules/{number:02}"));
        if path.extension().is_some_and(|extension| extension == "xz") {
            show_quietly(Command::new("xz").arg("-dc").arg(path).stdout(fs::File::create(to)?))?;
        } else {
            fs::copy(path, to)?;
        }
    }
    fs::write(root.join("job"), script)?;
    let env = format!("KERNEL_DIR='{}'\nRELEASE='{}'\n", kernel.dir.display(), kernel.release);
    fs::write(root.join("job.env"), env)?;
    let init = root.join("init");
    fs::write(&init, INIT)?;
    output(Command::new("chmod").arg("+x").arg(&init))?;
    let archive = run.join("initrd.cpio");
    let mut cpio = Command::new("sh");
    cpio.args(["-c", "find . | \"$0\" cpio -o -H newc"]).arg(busybox).current_dir(&root);
    show_quietly(cpio.stdout(fs::File::create(&archive)?))?;
    Ok(archive)
}

/// Starts virtiofsd on a read-only view of this machine's files, in a mount namespace of its own: it has no switch for
/// that itself. The workspace is added if it is on another file system; no other mount is to be seen.
fn serve_host(run: &Path, socket: &Path) -> Result<Ended> {
    let view = run.join("view");
    fs::create_dir_all(&view)?;
    let (root, workspace) = (Path::new("/"), cargo::root());
    let apart = root.metadata()?.dev() != workspace.metadata()?.dev();
    let mounts = "set -e; mount --make-rprivate /; view=$1; workspace=$2; shift 2
        mount --bind / \"$view\"; mount -o remount,bind,ro \"$view\"
        if [ -n \"$workspace\" ]; then
            mount --bind \"$workspace\" \"$view$workspace\"; mount -o remount,bind,ro \"$view$workspace\"
        fi
        exec \"$@\"";
    let virtiofsd = first_of(&["usr/lib/qemu/virtiofsd", "usr/libexec/virtiofsd"])?;
    let daemon = tool(&virtiofsd);
    let log = run.join("virtiofsd");
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", mounts, "sh"]).arg(&view);
    command.arg(if apart { workspace.as_os_str() } else { "".as_ref() });
    command.arg(daemon.get_program()).arg(format!("--socket-path={}", socket.display()));
    command.args(["-o", &format!("source={}", view.display()), "-o", "cache=always", "-o", "sandbox=chroot"]);
    // Raising the limit needs a capability that containers lack.
    command.arg("--rlimit-nofile=0");
    command.envs(daemon.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&log)?).spawn();
    let mut child = Ended(child.context("start unshare (package util-linux)")?);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !socket.exists() {
        if child.0.try_wait()?.is_some() || Instant::now() > deadline {
            bail!("virtiofsd did not start:\n{}", tail(&log));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(child)
}

/// A process that ends with its owner.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn tail(file: &Path) -> String {
    let text = fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// What a command prints; its complaints, if it fails.
fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {program}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command whose output goes elsewhere.
fn show_quietly(command: &mut Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).stderr(Stdio::null()).status()?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}
