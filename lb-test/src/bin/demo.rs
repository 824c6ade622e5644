//! The demo: the story of the README in network namespaces, every line of it obtained live.

use std::{
    collections::BTreeMap,
    fs,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Parser;
use lb_test::{
    cluster::{Answer, Cluster, Cni, bpftool, finish, node_ip, pod_ip},
    netns::sweep_all,
};

/// A client, two nodes and pods as network namespaces; one agent a node.
#[derive(Parser)]
struct Args {
    /// Leave everything up to look around.
    #[arg(long)]
    keep: bool,
    /// Remove what an earlier `--keep` left.
    #[arg(long)]
    remove: bool,
}

static STOPPED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_: i32) {
    STOPPED.store(true, Ordering::Relaxed);
}

fn main() -> Result<()> {
    let args = Args::parse();
    if args.remove {
        sweep_all();
        println!("removed");
        return Ok(());
    }
    // SAFETY: the handler only sets a flag. Commands get the signal too and end, so the demo goes on to its clean-up.
    unsafe {
        libc::signal(libc::SIGINT, on_signal as *const () as libc::sighandler_t);
        libc::signal(libc::SIGTERM, on_signal as *const () as libc::sighandler_t);
    }
    let started = Instant::now();
    let mut cluster = Cluster::new(Cni::Bridge, 2).context("build the namespaces (root is needed)")?;
    if args.keep {
        cluster.lab.keep();
    }
    let wrong = story(&mut cluster);
    if STOPPED.load(Ordering::Relaxed) {
        bail!("stopped; everything is removed");
    }
    let wrong = wrong?;
    println!("\n{} checks failed, {:.1} s", wrong, started.elapsed().as_secs_f64());
    if args.keep {
        look_around(&cluster);
        std::mem::forget(cluster);
    }
    if wrong > 0 {
        bail!("{wrong} checks failed");
    }
    Ok(())
}

/// The story's two objects, on pods of both nodes, and the two Nodes.
fn manifests() -> String {
    let pod = |node: u8, number: u8| {
        format!(
            "apiVersion: v1
kind: Pod
metadata: {{name: nginx-{node}{number}, labels: {{app: zgz}}}}
spec:
  nodeName: node{node}
  containers: [{{name: nginx, image: \"nginx:stable\", ports: [{{containerPort: 80, name: http-web-svc}}]}}]
status: {{podIPs: [{{ip: {}}}]}}
---
",
            pod_ip(node, number)
        )
    };
    pod(1, 1) + &pod(2, 1)
}

fn service(external_ip: Option<&str>) -> String {
    let patch = external_ip.map(|ip| format!("  externalIPs: [\"{ip}\"]\n")).unwrap_or_default();
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: nginx-service}}
spec:
  type: NodePort
  clusterIP: 10.96.0.80
  selector: {{app: zgz}}
  ports: [{{name: name-of-service-port, protocol: TCP, port: 80, nodePort: 30080, targetPort: http-web-svc}}]
{patch}"
    )
}

fn story(cluster: &mut Cluster) -> Result<u32> {
    let mut wrong = 0;
    let external = node_ip(1);
    println!(
        "client 192.0.2.9   node1 {}   node2 {}   pods {} {}\n",
        node_ip(1),
        node_ip(2),
        pod_ip(1, 1),
        pod_ip(2, 1)
    );
    for (host, port) in [("pod11", 80), ("pod21", 80), ("node1", 9000)] {
        cluster.serve(host, port)?;
    }
    cluster.apply_nodes()?;
    cluster.apply("pods.yaml", &manifests())?;
    cluster.apply("service.yaml", &service(None))?;
    for node in [1, 2] {
        cluster.start_agent(node)?;
        cluster.wait_for(node, "10.96.0.80:80/TCP", 2)?;
    }
    println!("{:<58} {:<9} SHARE OF EACH BACKEND", "WHO ASKS WHAT", "ANSWER");
    let before = cluster.ask("client", None, &["tcp", &format!("{external}:80"), "--timeout-ms", "500"])?;
    let refused = before.iter().all(|answer| answer.error.is_some());
    wrong += line(
        "client -> node1:80, before the patch",
        if refused { "nobody" } else { "SOMEBODY" },
        "",
        refused,
    );

    println!("\n  kubectl patch svc nginx-service -p '{{\"spec\":{{\"externalIPs\":[\"{external}\"]}}}}'\n");
    cluster.apply("service.yaml", &service(Some(&external)))?;
    for node in [1, 2] {
        cluster.wait_for(node, &format!("{external}:80/TCP"), 2)?;
    }
    for (what, from, served, target) in [
        ("client -> externalIP:80 (node1's own address)", "client", None, format!("{external}:80")),
        ("client -> NodePort through node1", "client", None, format!("{}:30080", node_ip(1))),
        ("client -> NodePort through node2", "client", None, format!("{}:30080", node_ip(2))),
        ("pod on node1 -> ClusterIP", "pod12", Some(1), "10.96.0.80:80".into()),
        ("pod on node2 -> externalIP", "pod22", Some(2), format!("{external}:80")),
        ("process on node1 -> ClusterIP", "node1", Some(1), "10.96.0.80:80".into()),
        ("process on node2 -> externalIP", "node2", Some(2), format!("{external}:80")),
    ] {
        let answers = cluster.ask(from, served, &["tcp", &target, "--count", "30"])?;
        let served = answers.iter().all(|answer| answer.id.is_some());
        wrong += line(what, if served { "served" } else { "FAILED" }, &shares(&answers), served);
    }
    for (what, from, served) in [
        ("client -> node1:9000, another port", "client", None),
        ("node2 -> node1:9000, another port", "node2", Some(2)),
    ] {
        let answer = cluster.tcp(from, served, &format!("{external}:9000"))?;
        let right = answer.id.as_deref() == Some("node1");
        wrong += line(what, answer.id.as_deref().unwrap_or("NOBODY"), "", right);
    }
    wrong += restart(cluster, &external)?;
    show_maps(cluster)?;
    Ok(wrong)
}

/// Prints a line and says whether it is wrong.
fn line(what: &str, answer: &str, share: &str, right: bool) -> u32 {
    println!("{what:<58} {answer:<9} {share}");
    u32::from(!right)
}

fn shares(answers: &[Answer]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for answer in answers {
        *counts.entry(answer.id.as_deref().or(answer.error.as_deref()).unwrap_or("?")).or_default() += 1;
    }
    counts
        .iter()
        .map(|(id, count)| format!("{id} {} %", count * 100 / answers.len()))
        .collect::<Vec<_>>()
        .join("   ")
}

/// Kills the agent in the middle of a download.
fn restart(cluster: &mut Cluster, external: &str) -> Result<u32> {
    let target = format!("{external}:80");
    let download =
        cluster.spawn("client", None, &["download", &target, "--bytes", "100000000", "--pause-ms", "1"])?;
    std::thread::sleep(Duration::from_millis(300));
    cluster.stop_agent(1, libc::SIGKILL)?;
    let meanwhile = cluster.tcp("client", None, &target)?;
    let served = meanwhile.id.is_some();
    let mut wrong = line(
        "client -> externalIP:80, agent of node1 killed",
        if served { "served" } else { "FAILED" },
        "",
        served,
    );
    cluster.start_agent(1)?;
    let result = finish(download);
    let right = result.is_ok();
    wrong += line(
        "download of 100 MB over the kill and the restart",
        if right { "whole" } else { "BROKEN" },
        &result.map_or_else(|error| format!("{error:#}"), |_| "every byte checked".into()),
        right,
    );
    Ok(wrong)
}

fn show_maps(cluster: &Cluster) -> Result<()> {
    println!("\nnode1$ lb-agent service list");
    let table = cluster.agent(1, &["service", "list"])?;
    table
        .lines()
        .filter(|line| !line.starts_with("10.244.") && !line.starts_with("127."))
        .for_each(|line| println!("  {}", line.trim_end()));
    let pins = cluster.lab.bpf_root("node1").join("v1");
    for map in ["LB4_FRONTENDS", "LB4_FLOWS"] {
        let path = pins.join(map).display().to_string();
        println!("\nnode1$ bpftool map dump pinned {path}   (the first entry)");
        let dump = bpftool(&["map", "dump", "pinned", &path])?;
        let first: Vec<&str> = dump.lines().take_while(|line| !line.starts_with("    },{")).collect();
        first.iter().take(48).for_each(|line| println!("  {line}"));
    }
    Ok(())
}

fn look_around(cluster: &Cluster) {
    let root = cluster.lab.bpf_root("node1");
    println!("\nEverything is still up. Look around:");
    println!(
        "  nsenter --net=/run/netns/{} target/release/netapp tcp {}:80",
        cluster.lab.ns("client"),
        node_ip(1)
    );
    println!("  bpftool map dump pinned {}/v1/LB4_FRONTENDS", root.display());
    println!("  target/release/lb-agent --bpf-root {} status", root.display());
    println!(
        "  {} holds the manifests: edit them",
        fs::canonicalize(cluster.manifests()).unwrap_or_default().display()
    );
    println!("Remove it: cargo xtask demo --remove");
}
