//! A small cluster of namespaces: a client and nodes on one LAN, pods behind each node, an agent on each.

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::{
    netns::{Lab, output},
    patience,
};

/// How pods reach their node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cni {
    /// A bridge with the pods' gateway address.
    Bridge,
    /// A route to each pod's veth, and a gateway address that the node answers for (as Calico does).
    Routed,
}

/// A cluster of two nodes.
pub struct Cluster {
    /// Everything it is made of.
    pub lab: Lab,
    cni: Cni,
    agents: Vec<(String, Option<Child>)>,
    /// More options for every agent.
    pub agent_options: Vec<String>,
    /// Agents watch the API server of this file, instead of reading manifests.
    pub kubeconfig: Option<PathBuf>,
    /// Where agents find programs, if not where everybody does.
    pub agent_path: Option<PathBuf>,
}

/// What a server answered, or what went wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Answer {
    /// The server's name.
    pub id: Option<String>,
    /// The client's address as the server sees it.
    pub client: Option<String>,
    /// Who the client's socket says it talks to.
    pub peer: Option<String>,
    /// `refused`, `timeout`, `reset`, `aborted`, `unconnected`, `denied`, `other`.
    pub error: Option<String>,
    /// How long it took, in milliseconds.
    pub ms: u64,
}

/// The node's address in the LAN.
pub fn node_ip(node: u8) -> String {
    format!("192.0.2.{}", 10 + node)
}

/// The node's IPv6 address in the LAN.
pub fn node_ip6(node: u8) -> String {
    format!("2001:db8::{}", 10 + node)
}

/// The client's address.
pub const CLIENT: &str = "192.0.2.9";
/// The client's IPv6 address.
pub const CLIENT6: &str = "2001:db8::9";

/// A pod's address.
pub fn pod_ip(node: u8, pod: u8) -> String {
    format!("10.244.{node}.{}", 10 + pod)
}

/// A pod's IPv6 address.
pub fn pod_ip6(node: u8, pod: u8) -> String {
    format!("fd00:10:244:{node}::{}", 10 + pod)
}

/// Both Nodes as manifests.
pub fn node_manifests() -> String {
    let node = |node| {
        format!(
            "kind: Node\nmetadata: {{name: node{node}}}\nstatus: {{addresses: [{{type: InternalIP, address: {}}}, {{type: InternalIP, address: '{}'}}]}}\n---\n",
            node_ip(node),
            node_ip6(node)
        )
    };
    node(1) + &node(2)
}

/// A pod as a manifest, for Services that select `app: web` or `pod: pod<node><number>`; its port 8080 is named `http` and,
/// for UDP, `dns`.
pub fn pod_manifest(node: u8, number: u8) -> String {
    format!(
        "kind: Pod\nmetadata: {{name: pod{node}{number}, labels: {{app: web, pod: pod{node}{number}}}}}\nspec: {{nodeName: node{node}, containers: [{{name: c, ports: [{{containerPort: 8080, name: http}}, {{containerPort: 8080, name: dns, protocol: UDP}}]}}]}}\nstatus: {{podIPs: [{{ip: {}}}, {{ip: '{}'}}]}}\n---\n",
        pod_ip(node, number),
        pod_ip6(node, number)
    )
}

impl Cluster {
    /// A client and two nodes, each with `pods` pods named `pod<node><number>` from 1 up.
    pub fn new(cni: Cni, pods: u8) -> Result<Self> {
        let mut cluster = Self {
            lab: Lab::new()?,
            cni,
            agents: Vec::new(),
            agent_options: Vec::new(),
            kubeconfig: None,
            agent_path: None,
        };
        cluster.build_lan()?;
        for node in [1, 2] {
            cluster.build_node(node)?;
            for pod in 1..=pods {
                cluster.build_pod(node, pod)?;
            }
        }
        fs::create_dir_all(cluster.manifests()).context("make the manifests' folder")?;
        Ok(cluster)
    }

    fn build_lan(&mut self) -> Result<()> {
        let lab = &mut self.lab;
        lab.add_ns("lan")?;
        lab.ip("lan", "link add br0 type bridge")?;
        lab.ip("lan", "link set br0 up")?;
        lab.ip("lan", "addr add 192.0.2.1/24 dev br0")?;
        lab.ip("lan", "addr add 2001:db8::1/64 dev br0 nodad")?;
        lab.sysctl("lan", "net.ipv4.ip_forward", "1")?;
        lab.add_ns("client")?;
        self.join_lan("client", CLIENT, CLIENT6)
    }

    fn join_lan(&mut self, host: &str, addr: &str, addr6: &str) -> Result<()> {
        let lab = &self.lab;
        lab.veth((host, "eth0"), ("lan", &format!("p-{host}")))?;
        lab.ip("lan", &format!("link set p-{host} master br0"))?;
        lab.ip(host, &format!("addr add {addr}/24 dev eth0"))?;
        lab.ip(host, &format!("addr add {addr6}/64 dev eth0 nodad"))?;
        lab.ip(host, "route add default via 192.0.2.1")?;
        lab.ip(host, "-6 route add default via 2001:db8::1")
    }

    fn build_node(&mut self, node: u8) -> Result<()> {
        let name = format!("node{node}");
        self.lab.add_ns(&name)?;
        self.join_lan(&name, &node_ip(node), &node_ip6(node))?;
        let lab = &self.lab;
        lab.sysctl(&name, "net.ipv4.ip_forward", "1")?;
        lab.sysctl(&name, "net.ipv6.conf.all.forwarding", "1")?;
        // Forwarding made the kernel drop the default route it had from nowhere: it was set by hand and stays.
        let other = if node == 1 { 2 } else { 1 };
        lab.ip(&name, &format!("route add 10.244.{other}.0/24 via {}", node_ip(other)))?;
        lab.ip(&name, &format!("-6 route add fd00:10:244:{other}::/64 via {}", node_ip6(other)))?;
        if self.cni == Cni::Bridge {
            lab.ip(&name, "link add cni0 type bridge")?;
            lab.ip(&name, "link set cni0 up")?;
            lab.ip(&name, &format!("addr add 10.244.{node}.1/24 dev cni0"))?;
            lab.ip(&name, &format!("addr add fd00:10:244:{node}::1/64 dev cni0 nodad"))?;
        }
        Ok(())
    }

    fn build_pod(&mut self, node: u8, pod: u8) -> Result<()> {
        let (node_name, name, veth) =
            (format!("node{node}"), format!("pod{node}{pod}"), format!("veth{node}{pod}"));
        self.lab.add_ns(&name)?;
        let lab = &self.lab;
        lab.veth((&node_name, &veth), (&name, "eth0"))?;
        match self.cni {
            Cni::Bridge => {
                lab.ip(&node_name, &format!("link set {veth} master cni0"))?;
                lab.ip(&name, &format!("addr add {}/24 dev eth0", pod_ip(node, pod)))?;
                lab.ip(&name, &format!("addr add {}/64 dev eth0 nodad", pod_ip6(node, pod)))?;
                lab.ip(&name, &format!("route add default via 10.244.{node}.1"))?;
                lab.ip(&name, &format!("-6 route add default via fd00:10:244:{node}::1"))
            }
            Cni::Routed => {
                lab.ip(&name, &format!("addr add {}/32 dev eth0", pod_ip(node, pod)))?;
                lab.ip(&name, &format!("addr add {}/128 dev eth0 nodad", pod_ip6(node, pod)))?;
                lab.ip(&name, "route add 169.254.1.1 dev eth0 scope link")?;
                lab.ip(&name, "route add default via 169.254.1.1 dev eth0")?;
                lab.sysctl(&node_name, &format!("net.ipv4.conf.{veth}.proxy_arp"), "1")?;
                // Else the kernel lets a proxied ARP request wait for up to 0.8 s (arp(7)), as Calico knows.
                lab.sysctl(&node_name, &format!("net.ipv4.neigh.{veth}.proxy_delay"), "0")?;
                lab.ip(&node_name, &format!("addr add fe80::1/64 dev {veth} nodad"))?;
                lab.ip(&name, "-6 route add default via fe80::1 dev eth0")?;
                lab.ip(&node_name, &format!("route add {}/32 dev {veth}", pod_ip(node, pod)))?;
                lab.ip(&node_name, &format!("-6 route add {}/128 dev {veth}", pod_ip6(node, pod)))
            }
        }
    }

    /// The client reaches ClusterIPs and addresses that no node has by way of node 1.
    pub fn route_services_to_node1(&self) -> Result<()> {
        for (family, nets, via) in [
            ("", ["198.51.100.0/24", "10.96.0.0/16"], node_ip(1)),
            ("-6 ", ["2001:db8:ffff::/64", "fd00:10:96::/64"], node_ip6(1)),
        ] {
            for net in nets {
                self.lab.ip("client", &format!("{family}route add {net} via {via}"))?;
            }
        }
        Ok(())
    }

    /// The folder all agents read.
    pub fn manifests(&self) -> PathBuf {
        self.lab.dir().join("manifests")
    }

    /// Writes a manifest in one step, as `kubectl apply` would.
    pub fn apply(&self, file: &str, yaml: &str) -> Result<()> {
        let path = self.manifests().join(file);
        let draft = self.manifests().join(format!(".{file}"));
        fs::write(&draft, yaml).with_context(|| format!("write {}", draft.display()))?;
        fs::rename(draft, &path).with_context(|| format!("write {}", path.display()))
    }

    /// Both Nodes as manifests.
    pub fn apply_nodes(&self) -> Result<()> {
        self.apply("nodes.yaml", &node_manifests())
    }

    /// kube-proxy's configuration file, for agents that are told to read one.
    pub fn config_file(&self) -> PathBuf {
        self.lab.dir().join("config.conf")
    }

    /// Writes it in place of the old one at once, as the kubelet does.
    pub fn configure(&self, fields: &str) -> Result<()> {
        let text =
            format!("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{fields}\n");
        let (path, draft) = (self.config_file(), self.lab.dir().join("config.new"));
        fs::write(&draft, text).with_context(|| format!("write {}", draft.display()))?;
        fs::rename(draft, &path).with_context(|| format!("write {}", path.display()))
    }

    /// Starts a server in a namespace, on all addresses.
    pub fn serve(&mut self, ns: &str, port: u16) -> Result<()> {
        self.serve_as(ns, ns, port)
    }

    /// Starts a server that answers with this name.
    pub fn serve_as(&mut self, id: &str, ns: &str, port: u16) -> Result<()> {
        let mut command = self.lab.command_in(ns, &format!("servers/{ns}"), &program("netapp"))?;
        command.args(["serve", "--id", id, "--listen", &format!("[::]:{port}")]);
        self.lab.start(command)
    }

    /// Starts a node's agent and waits until it is programmed.
    pub fn start_agent(&mut self, node: u8) -> Result<()> {
        self.start_agents(&[node])
    }

    /// Starts several nodes' agents at once and waits until all are programmed.
    pub fn start_agents(&mut self, nodes: &[u8]) -> Result<()> {
        nodes.iter().try_for_each(|node| self.launch_agent(*node))?;
        nodes.iter().try_for_each(|node| self.wait_until_healthy(*node))
    }

    /// Starts a node's agent, which may never get anything to program.
    pub fn launch_agent(&mut self, node: u8) -> Result<()> {
        let child = self.spawn_agent(node)?;
        let name = format!("node{node}");
        self.agents.retain(|(known, _)| *known != name);
        self.agents.push((name, Some(child)));
        Ok(())
    }

    /// The process of a node's agent.
    pub fn agent_pid(&self, node: u8) -> Option<u32> {
        let name = format!("node{node}");
        let agent = self.agents.iter().find(|(known, _)| *known == name);
        agent.and_then(|(_, child)| child.as_ref()).map(Child::id)
    }

    fn spawn_agent(&self, node: u8) -> Result<Child> {
        let name = format!("node{node}");
        let cgroup = self.lab.cgroup(&name);
        fs::create_dir_all(&cgroup)?;
        let log = fs::File::options().create(true).append(true).open(self.agent_log(node))?;
        let mut command = self.lab.command_in(&name, &format!("agents/{name}"), &program("lb-agent"))?;
        command.args(["run", "--node-name", &name]);
        match &self.kubeconfig {
            Some(path) => command.arg("--kubeconfig").arg(path),
            None => command.arg("--manifests").arg(self.manifests()),
        };
        command
            .arg("--bpf-root")
            .arg(self.lab.bpf_root(&name))
            .arg("--cgroup-root")
            .arg(cgroup)
            // Named, so that no agent has to try what works: `--mode auto` is for who asks for it.
            .args(["--mode", "ebpf"].iter().filter(|_| !self.names_mode()))
            .args(&self.agent_options)
            .stdout(Stdio::null())
            .stderr(log);
        if let Some(path) = &self.agent_path {
            command.env("PATH", path);
        }
        command.spawn().context("start lb-agent")
    }

    fn names_mode(&self) -> bool {
        self.agent_options.iter().any(|option| ["--mode", "--config"].contains(&option.as_str()))
    }

    /// Waits until a node's agent is programmed.
    pub fn wait_until_healthy(&mut self, node: u8) -> Result<()> {
        let name = format!("node{node}");
        let limit = patience(Duration::from_secs(60));
        let deadline = Instant::now() + limit;
        loop {
            let agent = self.agents.iter_mut().find(|(known, _)| *known == name);
            let child = agent.and_then(|(_, child)| child.as_mut()).context("an agent")?;
            if let Some(status) = child.try_wait()? {
                bail!("lb-agent on {name}: {status}\n{}", self.log_tail(node));
            }
            let probe = self
                .lab
                .command(&name, "curl")
                .args(["-sf", "-m", "1", "http://127.0.0.1:10256/healthz"])
                .output()?;
            if probe.status.success() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("lb-agent on {name}: not healthy in {limit:?}\n{}", self.log_tail(node));
            }
            std::thread::sleep(patience(Duration::from_millis(30)));
        }
    }

    /// Ends a node's agent with a signal and waits for it.
    pub fn stop_agent(&mut self, node: u8, signal: i32) -> Result<()> {
        let name = format!("node{node}");
        let agent = self.agents.iter_mut().find(|(known, _)| *known == name);
        let Some(mut child) = agent.and_then(|(_, child)| child.take()) else { bail!("no agent on {name}") };
        // SAFETY: a plain system call; the child has not been waited for.
        unsafe { libc::kill(child.id() as i32, signal) };
        child.wait()?;
        Ok(())
    }

    /// Where a node's agent logs.
    pub fn agent_log(&self, node: u8) -> PathBuf {
        self.lab.dir().join(format!("node{node}.log"))
    }

    /// The last lines of it.
    pub fn log_tail(&self, node: u8) -> String {
        let text = fs::read_to_string(self.agent_log(node)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Runs an agent command about a node, such as `service list`.
    pub fn agent(&self, node: u8, args: &[&str]) -> Result<String> {
        let name = format!("node{node}");
        output(
            self.lab
                .command(&name, &program("lb-agent"))
                .args(args)
                .arg("--bpf-root")
                .arg(self.lab.bpf_root(&name)),
        )
    }

    /// Waits until a node's agent serves `frontend` (as `service list` prints it) with so many backends outside.
    pub fn wait_for(&self, node: u8, frontend: &str, backends: usize) -> Result<()> {
        let deadline = Instant::now() + patience(Duration::from_secs(10));
        loop {
            let rows: serde_json::Value =
                serde_json::from_str(&self.agent(node, &["service", "list", "-o", "json"])?)?;
            let found = rows.as_array().into_iter().flatten().find(|row| row["frontend"] == frontend);
            if found.is_some_and(|row| row["internal"].as_array().map_or(0, Vec::len) == backends) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!(
                    "node{node} doesn't serve {frontend} with {backends} backends:\n{rows:#}\n{}",
                    self.log_tail(node)
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Asks from a namespace; `served`: the process is in the node's cgroup tree, so its socket calls are ours.
    pub fn ask(&self, from: &str, served: Option<u8>, args: &[&str]) -> Result<Vec<Answer>> {
        let mut command = match served {
            Some(node) => self.lab.command_in(from, &format!("node{node}/{from}"), &program("netapp"))?,
            None => self.lab.command(from, &program("netapp")),
        };
        let text = output(command.args(args))?;
        text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("read {line}"))).collect()
    }

    /// One TCP question.
    pub fn tcp(&self, from: &str, served: Option<u8>, target: &str) -> Result<Answer> {
        self.ask(from, served, &["tcp", target])?.pop().context("one answer")
    }

    /// Starts a client that goes on by itself.
    pub fn spawn(&self, from: &str, served: Option<u8>, args: &[&str]) -> Result<Child> {
        self.spawn_told(from, served, args, Stdio::null())
    }

    /// The same, with something to listen to.
    pub(crate) fn spawn_told(
        &self,
        from: &str,
        served: Option<u8>,
        args: &[&str],
        told: Stdio,
    ) -> Result<Child> {
        let mut command = match served {
            Some(node) => self.lab.command_in(from, &format!("node{node}/{from}"), &program("netapp"))?,
            None => self.lab.command(from, &program("netapp")),
        };
        command.args(args).stdin(told).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().context("start netapp")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for (_, child) in &mut self.agents {
            if let Some(child) = child {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

/// Waits for a client and returns what it printed; fails with what it complained of.
pub fn finish(mut child: Child) -> Result<String> {
    let (mut out, mut err) = (String::new(), String::new());
    child.stdout.take().context("piped")?.read_to_string(&mut out)?;
    child.stderr.take().context("piped")?.read_to_string(&mut err)?;
    let status = child.wait()?;
    if !status.success() {
        bail!("{status}: {err}");
    }
    std::io::stderr().write_all(err.as_bytes())?;
    Ok(out)
}

/// A binary built beside the running one.
pub fn program(name: &str) -> String {
    let me = std::env::current_exe().expect("a running program has a path");
    let mut dir: &Path = me.parent().expect("a file lies in a folder");
    if dir.ends_with("deps") {
        dir = dir.parent().expect("deps lies in the profile's folder");
    }
    dir.join(name).display().to_string()
}

/// Runs bpftool.
pub fn bpftool(args: &[&str]) -> Result<String> {
    output(Command::new("bpftool").args(args))
}
