//! A client that goes on talking, and what it has heard so far.

use std::{
    io::{BufRead, BufReader, Read},
    process::Child,
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{
    cluster::{Answer, Cluster},
    patience,
};

/// A running client; it ends when it is dropped.
pub struct Talk {
    name: String,
    child: Child,
    answers: Receiver<Answer>,
    heard: Vec<Answer>,
}

/// How long a talk goes on if nobody ends it.
const LONGEST: Duration = Duration::from_secs(120);

impl Talk {
    /// One UDP socket that asks again and again, from this port.
    pub fn udp(
        cluster: &Cluster,
        (from, served): (&str, Option<u8>),
        target: &str,
        port: u16,
        more: &[&str],
    ) -> Result<Self> {
        let (port, longest) = (port.to_string(), patience(LONGEST).as_secs().to_string());
        let args = ["talk", target, "--secs", &longest, "--source-port", &port];
        Self::start(cluster, from, served, &[&args, more].concat())
    }

    /// One TCP connection on which somebody asks again and again.
    pub fn tcp(
        cluster: &Cluster,
        (from, served): (&str, Option<u8>),
        target: &str,
        more: &[&str],
    ) -> Result<Self> {
        let longest = patience(LONGEST).as_secs().to_string();
        Self::start(cluster, from, served, &[&["talk-tcp", target, "--secs", &longest], more].concat())
    }

    fn start(cluster: &Cluster, from: &str, served: Option<u8>, args: &[&str]) -> Result<Self> {
        let mut child = cluster.spawn(from, served, args)?;
        let lines = BufReader::new(child.stdout.take().context("piped")?).lines();
        let (heard, answers) = channel();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let Ok(answer) = serde_json::from_str(&line) else { return };
                if heard.send(answer).is_err() {
                    return;
                }
            }
        });
        let name = format!("{from} {}", args[..2].join(" "));
        Ok(Self { name, child, answers, heard: Vec::new() })
    }

    /// Waits for what is wanted; fails with what was heard instead.
    pub fn until(&mut self, limit: Duration, wanted: impl Fn(&Answer) -> bool) -> Result<Answer> {
        let deadline = Instant::now() + patience(limit);
        loop {
            match self.answers.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(answer) if wanted(&answer) => return Ok(answer),
                Ok(answer) => self.heard.push(answer),
                Err(RecvTimeoutError::Timeout) => bail!("{}: in vain; heard {:?}", self.name, self.tail()),
                Err(RecvTimeoutError::Disconnected) => {
                    let mut said = String::new();
                    self.child.stderr.take().context("piped")?.read_to_string(&mut said)?;
                    bail!("{}: ended: {said}; heard {:?}", self.name, self.tail())
                }
            }
        }
    }

    /// Waits for an answer of this server.
    pub fn until_answered_by(&mut self, id: &str) -> Result<()> {
        self.until(Duration::from_secs(5), |answer| answer.id.as_deref() == Some(id)).map(drop)
    }

    /// Listens to so many answers, all of which must be of this server.
    pub fn stays_with(&mut self, id: &str, answers: usize) -> Result<()> {
        for _ in 0..answers {
            let answer = self.until(Duration::from_secs(5), |_| true)?;
            if answer.id.as_deref() != Some(id) {
                bail!("{}: heard {answer:?} instead of {id}", self.name);
            }
        }
        Ok(())
    }

    fn tail(&self) -> &[Answer] {
        &self.heard[self.heard.len().saturating_sub(5)..]
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
