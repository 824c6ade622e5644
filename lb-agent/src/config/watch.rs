//! Follows the configuration file: what is written there becomes what the agent does, without a restart.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tracing::{debug, info, warn};

use super::File;
use crate::{
    args::{Config, RunArgs},
    source::is_change,
};

/// The file is read again this often even without news: some file systems give none.
const POLL: Duration = Duration::from_secs(10);

/// Writers take a moment, and the kubelet changes a ConfigMap's files by moving links.
const SETTLE: Duration = Duration::from_millis(50);

/// A configuration file that is followed; without one nothing ever changes.
pub struct Watched<'a> {
    options: &'a RunArgs,
    file: &'a File,
    bpf_root: &'a Path,
    path: Option<&'a PathBuf>,
    news: mpsc::Receiver<()>,
    _watcher: Option<RecommendedWatcher>,
    /// When it is looked at; kept here, for a wait may be given up for something else at any time.
    due: Instant,
    /// When it is tried as it is.
    again: Option<Instant>,
    /// What was last told to be wrong with it.
    told: String,
}

impl<'a> Watched<'a> {
    /// Follows the file of the options; `file` is how it was read. If it could not be begun with, it is tried `again`
    /// after that time even if it is still the same.
    pub fn new(options: &'a RunArgs, file: &'a File, bpf_root: &'a Path, again: Option<Duration>) -> Self {
        let (sender, news) = mpsc::channel(1);
        let path = options.policy.config.as_ref();
        let watcher = path.and_then(|path| {
            // The folder, because the file may be replaced.
            let folder =
                path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let tell = move |event| {
                if is_change(event) {
                    let _ = sender.try_send(());
                }
            };
            let mut watcher = notify::recommended_watcher(tell).ok()?;
            watcher.watch(folder, RecursiveMode::NonRecursive).ok()?;
            Some(watcher)
        });
        if path.is_some() && watcher.is_none() {
            debug!("no news of the configuration file's folder: it is read every {} s", POLL.as_secs());
        }
        Self {
            options,
            file,
            bpf_root,
            path,
            news,
            _watcher: watcher,
            due: Instant::now() + POLL.min(again.unwrap_or(POLL)),
            again: again.map(|wait| Instant::now() + wait),
            told: String::new(),
        }
    }

    /// Waits until the file says something else that the agent can do.
    pub async fn changed(&mut self) -> (Config, File) {
        let Some(path) = self.path else { return std::future::pending().await };
        loop {
            tokio::select! {
                Some(()) = self.news.recv() => self.due = self.due.min(Instant::now() + SETTLE),
                () = sleep_until(self.due) => {
                    self.due = Instant::now() + POLL;
                    if let Some(changed) = self.look(path) {
                        return changed;
                    }
                }
            }
        }
    }

    /// What the file says, if that is something else that the agent can do.
    fn look(&mut self, path: &Path) -> Option<(Config, File)> {
        let read = File::read(path).and_then(|file| {
            let differences = self.file.differences(&file);
            let again = self.again.is_some_and(|at| at <= Instant::now());
            if differences.is_empty() && !again {
                return Ok(None);
            }
            // Only now: to find the mode `auto` means a try of each.
            let config = self.options.resolve(&file, self.bpf_root)?;
            Ok(Some((differences, config, file)))
        });
        match read {
            Ok(None) => self.told.clear(),
            Ok(Some((differences, config, file))) if differences.is_empty() => {
                info!(file = %path.display(), "the configuration that could not be used is tried again");
                return Some((config, file));
            }
            Ok(Some((differences, config, file))) => {
                info!(file = %path.display(), changed = differences.join(", "), "a new configuration; the kernel goes on serving");
                file.warn(path);
                return Some((config, file));
            }
            Err(error) => {
                let problem = format!("{error:#}");
                if problem != self.told {
                    warn!(problem, "the configuration can't be used; the last one holds");
                    self.told = problem;
                }
            }
        }
        None
    }
}
