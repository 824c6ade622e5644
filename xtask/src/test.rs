//! `test`: runs the rings and adds up what they say.

use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Command, Output, Stdio},
    sync::{Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{
    build_ebpf, cargo,
    cargo::is_root,
    check::{UNPRIVILEGED, UNPRIVILEGED_OF_LB_TEST},
    tidy, vm,
};

/// A ring of tests, least power first.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Ring {
    /// Beside the code, and golden folders: no root.
    Unit,
    /// Real programs under BPF_PROG_TEST_RUN: root.
    Packet,
    /// Real sockets in network namespaces: root.
    Netns,
    /// Debian's kernels in qemu: root, on Debian for x86-64.
    Vm,
}

/// A test binary, and which of its tests; all if none is named.
type InVm = (&'static str, &'static [&'static str]);

/// What runs in the VM, by kernel package. IPVS needs a kernel that has it.
const IN_VM: [(&str, &[InVm]); 2] = [
    (
        "linux-image-cloud-amd64",
        &[
            ("vm_kernel", &[]),
            ("vm_outage", &[]),
            (
                "vm_ipvs",
                &[
                    "a_changed_file_takes_effect_under_open_connections",
                    "a_nodes_address_as_external_ip_cuts_nobody_off",
                    "an_endpoint_that_the_kernel_refuses_costs_no_other_its_place",
                    "another_mode_takes_over_without_cutting_a_connection",
                    "connections_to_an_endpoint_that_is_gone_end_by_themselves",
                    "every_path_with_ipvs",
                    "listeners_of_the_host_are_not_reached_through_vips",
                    "the_kernel_takes_every_scheduler",
                    "what_somebody_clears_comes_back_and_cleanup_takes_only_ours",
                ],
            ),
            (
                "netns_health",
                &[
                    "a_change_that_waits_too_long_makes_the_node_unhealthy",
                    "health_check_node_port_closes_with_policy_local",
                    "health_check_node_port_should_fail_with_only_terminating_endpoints",
                    "the_metrics_port_is_kube_proxys",
                ],
            ),
            (
                "netns_udp",
                &[
                    "connected_udp_sockets_get_an_error_when_their_backend_is_gone_if_told_so",
                    "tcp_to_a_terminating_backend_goes_on",
                    "the_invalid_conntrack_state_bug_does_no_harm",
                    "udp_goes_on_when_initially_unready_endpoints_get_ready",
                    "udp_goes_on_when_the_server_pod_cycles_and_the_client_is_on_the_hosts_network",
                    "udp_goes_on_when_the_server_pod_cycles_for_a_cluster_ip",
                    "udp_goes_on_when_the_server_pod_cycles_for_a_cluster_ip_with_internal_traffic_policy_local",
                    "udp_goes_on_when_the_server_pod_cycles_for_a_load_balancer",
                    "udp_goes_on_when_the_server_pod_cycles_for_a_node_port",
                    "udp_goes_on_when_the_target_port_changes",
                    "udp_to_a_foreign_host_at_a_node_ports_number_is_not_cut",
                    "what_conntrack_forgot_is_counted",
                ],
            ),
            (
                "netns_config",
                &[
                    "pods_are_told_by_their_bridge_and_by_their_devices",
                    "pods_are_told_by_their_nodes_ranges",
                ],
            ),
            (
                "netns_services",
                &[
                    "every_path_with_bridged_pods",
                    "every_path_with_routed_pods",
                    "every_path_with_iptables",
                    "every_path_with_nftables",
                ],
            ),
        ],
    ),
    ("linux-image-6.12-cloud-amd64", &[("vm_kernel", &[])]),
];

/// Tests that take minutes and repeat much of what others there show: they run if the ring is named.
const IN_VM_IF_NAMED: [&str; 20] = [
    "pods_are_told_by_their_bridge_and_by_their_devices",
    "pods_are_told_by_their_nodes_ranges",
    "every_path_with_bridged_pods",
    "every_path_with_routed_pods",
    "every_path_with_iptables",
    "every_path_with_nftables",
    "every_path_with_ipvs",
    "another_mode_takes_over_without_cutting_a_connection",
    "connections_to_an_endpoint_that_is_gone_end_by_themselves",
    "what_somebody_clears_comes_back_and_cleanup_takes_only_ours",
    "a_changed_file_takes_effect_under_open_connections",
    "connected_udp_sockets_get_an_error_when_their_backend_is_gone_if_told_so",
    "tcp_to_a_terminating_backend_goes_on",
    "the_invalid_conntrack_state_bug_does_no_harm",
    "udp_goes_on_when_initially_unready_endpoints_get_ready",
    "udp_goes_on_when_the_server_pod_cycles_and_the_client_is_on_the_hosts_network",
    "udp_goes_on_when_the_server_pod_cycles_for_a_cluster_ip_with_internal_traffic_policy_local",
    "udp_goes_on_when_the_server_pod_cycles_for_a_load_balancer",
    "udp_goes_on_when_the_target_port_changes",
    "udp_to_a_foreign_host_at_a_node_ports_number_is_not_cut",
];

/// How much slower than usual the VM's clock may find us (`lb_test::patience`).
const VM_SLOWNESS: u32 = 5;

/// For one kernel's tests. On two cores that others used as well all of them take more than half an hour.
const VM_LIMIT: Duration = Duration::from_secs(60 * 60);

#[derive(Default)]
struct Sum {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Sum {
    /// Shows a line and counts what it says.
    fn read(&mut self, line: &str) {
        println!("{line}");
        if line.starts_with("SKIP ") {
            self.skipped += 1;
        }
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.passed += count(counts, " passed");
            self.failed += count(counts, " failed");
        }
    }
}

/// Runs the named rings, or all, and closes with one line of counts. Without `vm` the last ring is left out of all.
pub fn run(rings: &[Ring], vm: bool) -> Result<()> {
    let all = [Ring::Unit, Ring::Packet, Ring::Netns, Ring::Vm];
    let named = !rings.is_empty();
    let rings = if named { rings } else { &all };
    if rings.iter().any(|ring| *ring != Ring::Unit) && !is_root() {
        bail!("packet, netns and vm tests need root: run as root, or `cargo xtask test unit`");
    }
    build_ebpf::run()?;
    let mut sum = Sum::default();
    for ring in rings {
        match ring {
            Ring::Unit => {
                tidy::run()?;
                let mut args = vec!["test", "--no-fail-fast"];
                UNPRIVILEGED.iter().for_each(|name| args.extend(["-p", name]));
                cargo_test(&args, &mut sum)?;
                cargo_test(&UNPRIVILEGED_OF_LB_TEST, &mut sum)?;
            }
            Ring::Packet => {
                build_ebpf::verify()?;
                cargo_test(
                    &[
                        "test",
                        "--no-fail-fast",
                        "-p",
                        "lb-test",
                        "--lib",
                        "--test",
                        "packet_*",
                        "--",
                        "--test-threads=2",
                    ],
                    &mut sum,
                )?;
            }
            Ring::Netns => {
                cargo_test(&["build", "-p", "lb-agent", "-p", "lb-test", "--bins"], &mut Sum::default())?;
                netns(&mut sum)?;
            }
            Ring::Vm => match vm::obstacle() {
                _ if !vm => skip("vm: left out by --no-vm", &mut sum),
                Some(reason) if named => bail!("no test VM here: {reason}"),
                Some(reason) => skip(&format!("vm: {reason}"), &mut sum),
                None => in_vm(named, &mut sum)?,
            },
        }
    }
    println!("\n{} passed, {} failed, {} skipped", sum.passed, sum.failed, sum.skipped);
    if sum.failed > 0 {
        bail!("{} tests failed", sum.failed);
    }
    Ok(())
}

/// Binaries of the ring netns that run at once; their tests wait more than they work.
const NETNS_AT_ONCE: usize = 2;
/// How many tests of each run at once…
const NETNS_THREADS: &str = "--test-threads=2";
/// …and of those that wait for an API server.
const NETNS_API_THREADS: &str = "--test-threads=4";
/// They take longest.
const NETNS_FIRST: [&str; 2] = ["netns_api", "netns_services"];

/// Runs the ring netns. What a binary prints is shown when it ends.
fn netns(sum: &mut Sum) -> Result<()> {
    let tests = netns_tests()?;
    let mut build = vec!["test", "--no-run", "-p", "lb-test"];
    tests.iter().for_each(|test| build.extend(["--test", test]));
    cargo::run(&build)?;
    let todo = Mutex::new(tests.into_iter());
    let (said, outputs) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..NETNS_AT_ONCE {
            let (todo, said) = (&todo, said.clone());
            scope.spawn(move || {
                while let Some(test) = { todo.lock().unwrap_or_else(PoisonError::into_inner).next() } {
                    let output = netns_binary(&test);
                    let _ = said.send((test, output));
                }
            });
        }
        drop(said);
        for (test, output) in outputs {
            let output = output?;
            let failed_before = sum.failed;
            String::from_utf8_lossy(&output.stdout).lines().for_each(|line| sum.read(line));
            if !output.status.success() && sum.failed == failed_before {
                bail!("{test}: {}", output.status);
            }
        }
        Ok(())
    })
}

fn netns_binary(test: &str) -> Result<Output> {
    let threads = if test.starts_with("netns_api") { NETNS_API_THREADS } else { NETNS_THREADS };
    let args = ["test", "-p", "lb-test", "--test", test, "--", threads];
    eprintln!("+ cargo {}", args.join(" "));
    Command::new("cargo").args(args).stderr(Stdio::inherit()).output().context("start cargo")
}

/// Names of its binaries, the longest first.
fn netns_tests() -> Result<Vec<String>> {
    let mut tests = Vec::new();
    for entry in fs::read_dir("lb-test/tests").context("read lb-test/tests")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        tests.extend(name.strip_suffix(".rs").filter(|test| test.starts_with("netns_")).map(str::to_owned));
    }
    tests.sort_by_key(|test| (!NETNS_FIRST.contains(&test.as_str()), test.clone()));
    Ok(tests)
}

/// Runs `cargo test`, shows what it prints, and counts. A failing test is counted; a build that fails is an error.
fn cargo_test(args: &[&str], sum: &mut Sum) -> Result<()> {
    eprintln!("+ cargo {}", args.join(" "));
    let mut child = Command::new("cargo").args(args).stdout(Stdio::piped()).spawn().context("start cargo")?;
    let stdout = child.stdout.take().context("cargo's output")?;
    let failed_before = sum.failed;
    for line in BufReader::new(stdout).lines() {
        sum.read(&line?);
    }
    let status = child.wait()?;
    if !status.success() && sum.failed == failed_before {
        bail!("cargo {}: {status}", args.join(" "));
    }
    Ok(())
}

fn skip(what: &str, sum: &mut Sum) {
    sum.read(&format!("SKIP {what}"));
}

/// Boots each kernel once for its tests; `all` of them, or what is worth the time in every run.
fn in_vm(all: bool, sum: &mut Sum) -> Result<()> {
    cargo::run(&["build", "-p", "lb-agent", "-p", "lb-test", "--bins"])?;
    for (package, tests) in IN_VM {
        let Some(kernel) = vm::fetch(package)? else {
            skip(&format!("vm: this Debian release has no {package}"), sum);
            continue;
        };
        let script = script(tests, all, sum)?;
        eprintln!("+ boot {}", kernel.release);
        let started = Instant::now();
        let failed_before = sum.failed;
        let code = vm::boot(&kernel, &script, VM_LIMIT, |line| sum.read(line))?;
        eprintln!("{}: {} s", kernel.release, started.elapsed().as_secs());
        if code != 0 && sum.failed == failed_before {
            bail!("kernel {}: a test program ended with {code}", kernel.release);
        }
    }
    Ok(())
}

/// Runs test binaries one after the other, in the workspace; fails if one does.
fn script(tests: &[InVm], all: bool, sum: &mut Sum) -> Result<String> {
    let (root, path) = (cargo::root(), std::env::var("PATH")?);
    let mut script = format!(
        "export PATH='{path}:/usr/sbin:/sbin' HOME=/root IN_VM=1 LB_TEST_SLOW={VM_SLOWNESS}\ncd '{}'\ncode=0\n",
        root.display()
    );
    for (binary, names) in tests {
        let file = test_binary(binary)?;
        let (seldom, often): (Vec<&str>, Vec<&str>) =
            names.iter().partition(|name| !all && IN_VM_IF_NAMED.contains(name));
        for name in seldom {
            skip(&format!("vm {name}: takes minutes there; `cargo xtask test vm` runs it"), sum);
        }
        // Without names a binary runs all it has.
        if often.is_empty() && !names.is_empty() {
            continue;
        }
        let names = often;
        script += &format!("'{file}' --color=never --test-threads=1 {} || code=$?\n", names.join(" "));
    }
    Ok(script + "exit $code\n")
}

/// Builds a test of lb-test and says where it is.
fn test_binary(name: &str) -> Result<String> {
    let mut cargo = Command::new("cargo");
    cargo.args(["test", "--no-run", "-p", "lb-test", "--test", name, "--message-format=json"]);
    let output = cargo.stderr(Stdio::inherit()).output().context("start cargo")?;
    if !output.status.success() {
        bail!("build the test {name}: {}", output.status);
    }
    let file = String::from_utf8_lossy(&output.stdout).lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        (message["target"]["name"] == name).then(|| message["executable"].as_str().map(str::to_owned))?
    });
    file.with_context(|| format!("cargo names no binary for the test {name}"))
}

/// The number before a word, as in `ok. 12 passed; 0 failed; …`.
fn count(line: &str, word: &str) -> u64 {
    let before = line.split(word).next().unwrap_or_default();
    before.rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn counts_are_read_from_libtest() {
        let line = "FAILED. 12 passed; 3 failed; 0 ignored; 0 measured";
        assert_eq!((count(line, " passed"), count(line, " failed")), (12, 3));
    }
}
