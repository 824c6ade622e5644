//! A cluster of namespaces with an API server in it.

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    apiserver::{ApiServer, Kind, Verb},
    cluster::{CLIENT, Cluster, Cni, node_manifests, pod_ip},
    netns, patience,
};

/// Long enough for the longest wait between two tries of the agent's, and for a request that gets no answer.
pub const LONG: Duration = Duration::from_secs(120);

/// A cluster whose first node has an agent that watches an API server, which runs beside the client.
pub struct World {
    /// The nodes.
    pub cluster: Cluster,
    /// What they watch.
    pub server: ApiServer,
}

impl World {
    #[expect(clippy::new_without_default, reason = "it starts processes")]
    /// Nodes, pods that serve, and an API server that knows the nodes; no agent yet.
    pub fn new() -> Self {
        let mut cluster = Cluster::new(Cni::Bridge, 2).unwrap();
        cluster.serve("pod11", 8080).unwrap();
        cluster.serve("pod21", 8080).unwrap();
        let server =
            ApiServer::start(&cluster.lab, "client", format!("{CLIENT}:6443").parse().unwrap()).unwrap();
        server.put(&node_manifests()).unwrap();
        cluster.kubeconfig = Some(server.kubeconfig().unwrap());
        Self { cluster, server }
    }

    /// The same with these objects, and an agent that serves them.
    pub fn with(objects: &str) -> Self {
        let mut world = Self::new();
        world.server.put(objects).unwrap();
        world.start();
        world
    }

    /// Starts the agent, and waits until it serves.
    pub fn start(&mut self) {
        let started = Instant::now();
        self.cluster.start_agent(1).unwrap();
        println!("agent started and programmed: {:?}", started.elapsed());
    }

    /// Backends by frontend, from the pinned maps.
    pub fn served(&self) -> BTreeMap<String, Vec<String>> {
        let listed = || self.cluster.agent(1, &["service", "list", "-o", "json"]);
        // A backend may go between two reads of the maps.
        let text = (0..5).find_map(|_| listed().ok()).expect("the pinned maps can be read");
        let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
        let backends = |row: &Value| serde_json::from_value(row["internal"].clone()).unwrap();
        rows.iter().map(|row| (row["frontend"].as_str().unwrap().to_owned(), backends(row))).collect()
    }

    /// The node serves this Service.
    pub fn serves(&self, number: u8) -> bool {
        self.served().contains_key(&frontend(number))
    }

    /// Waits until the node serves so, and says how long it took.
    pub fn until(&self, what: &str, holds: impl Fn(&BTreeMap<String, Vec<String>>) -> bool) {
        self.wait(what, || holds(&self.served()));
    }

    /// Waits for these words in the agent's log.
    pub fn until_logged(&self, what: &str) {
        self.wait(&format!("log: {what}"), || self.log().contains(what));
    }

    /// Waits, and says how long it took.
    pub fn wait(&self, what: &str, holds: impl Fn() -> bool) {
        let started = Instant::now();
        while !holds() {
            assert!(started.elapsed() < patience(LONG), "never: {what}\n{}", self.cluster.log_tail(1));
            std::thread::sleep(Duration::from_millis(20));
        }
        println!("{what}: {:?}", started.elapsed());
    }

    /// The agent's log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.cluster.agent_log(1)).unwrap()
    }

    /// How often everything of a kind was asked for.
    pub fn lists(&self, kind: Kind) -> usize {
        self.server.count(kind, Verb::List) + self.server.count(kind, Verb::WatchList)
    }

    /// How many answers with this code the agent has counted.
    pub fn answers(&self, code: &str) -> u64 {
        let curl = ["-sS", "http://127.0.0.1:10249/metrics"];
        let page = netns::output(self.cluster.lab.command("node1", "curl").args(curl)).unwrap();
        let name =
            format!("rest_client_requests_total{{code=\"{code}\",host=\"{CLIENT}:6443\",method=\"GET\"}} ");
        page.lines().find_map(|line| line.strip_prefix(&name)).map_or(0, |count| count.parse().unwrap())
    }

    /// A connection from a pod of the node: who answers?
    pub fn asked(&self, number: u8) -> Option<String> {
        self.cluster.tcp("pod12", None, &format!("10.96.0.{number}:80")).unwrap().id
    }

    /// Of the agent's process, in KiB: `VmRSS`, `VmHWM`.
    pub fn memory(&self, field: &str) -> u64 {
        let pid = self.cluster.agent_pid(1).unwrap();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(&format!("{field}:"))).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Notes of the Events on an object.
    pub fn notes_on(&self, name: &str) -> Vec<String> {
        let events = self.server.events();
        let on = events.iter().filter(|event| event["regarding"]["name"] == name);
        on.map(|event| event["note"].as_str().unwrap_or_default().to_owned()).collect()
    }
}

/// The Service's VIP and port, as the agent lists it.
pub fn frontend(number: u8) -> String {
    format!("10.96.0.{number}:80/TCP")
}

/// Service `s<number>` with more metadata.
pub fn service(number: u8, more: &str) -> String {
    format!(
        "kind: Service\nmetadata: {{name: s{number}, {more}}}\nspec: {{clusterIP: 10.96.0.{number}, ports: [{{name: http, port: 80}}]}}\n---\n"
    )
}

/// Its EndpointSlice.
pub fn slice(number: u8, addresses: &[&str]) -> String {
    let endpoints: Vec<String> =
        addresses.iter().map(|address| format!("{{addresses: [{address}]}}")).collect();
    format!(
        "kind: EndpointSlice\nmetadata: {{name: s{number}-a, labels: {{kubernetes.io/service-name: s{number}}}}}\naddressType: IPv4\nports: [{{name: http, port: 8080}}]\nendpoints: [{}]\n---\n",
        endpoints.join(", ")
    )
}

/// A Service with one endpoint, in pod11.
pub fn whole(number: u8) -> String {
    service(number, "") + &slice(number, &[&pod_ip(1, 1)])
}
