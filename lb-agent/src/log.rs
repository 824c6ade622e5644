//! What is logged and how. Both may change while the agent runs.

use std::io::IsTerminal;

use anyhow::{Context, Result};
use tracing::{level_filters::LevelFilter, warn};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    layer::{Layered, SubscriberExt},
    reload,
    util::SubscriberInitExt,
};

use crate::{
    args::{DEFAULT_LOG, LogFormat},
    config::kube_proxy::Logging,
};

/// What passes the filter.
type Filtered = Layered<reload::Layer<EnvFilter, Registry>, Registry>;
/// Writes it.
type Lines = Box<dyn Layer<Filtered> + Send + Sync>;

/// The log of this process.
pub struct Log {
    /// `--log`.
    filter: String,
    /// `--log-format`.
    format: LogFormat,
    filters: reload::Handle<EnvFilter, Registry>,
    lines: reload::Handle<Lines, Filtered>,
}

impl Log {
    /// Starts it, once in a process. Options go before the configuration.
    pub fn start(filter: &str, format: LogFormat, logging: &Logging) -> Result<Self> {
        let (filter_layer, filters) = reload::Layer::new(filter_of(filter, logging)?);
        let (lines_layer, lines) = reload::Layer::new(lines_of(format, logging));
        tracing_subscriber::registry().with(filter_layer).with(lines_layer).init();
        Ok(Self { filter: filter.to_owned(), format, filters, lines })
    }

    /// Does as a new configuration says.
    pub fn follow(&self, logging: &Logging) {
        let follow = || -> Result<()> {
            self.filters.reload(filter_of(&self.filter, logging)?)?;
            self.lines.reload(lines_of(self.format, logging))?;
            Ok(())
        };
        match follow() {
            // For what logs by the crate log.
            Ok(()) => log::set_max_level(match LevelFilter::current().into_level() {
                Some(level) => level.as_str().parse().unwrap_or(log::LevelFilter::Info),
                None => log::LevelFilter::Off,
            }),
            Err(error) => warn!(error = %format!("{error:#}"), "the log stays as it is"),
        }
    }
}

fn filter_of(option: &str, logging: &Logging) -> Result<EnvFilter> {
    let directives = match logging.verbosity.unwrap_or(0) {
        8.. if option == DEFAULT_LOG => "trace",
        4.. if option == DEFAULT_LOG => "debug",
        _ => option,
    };
    // They log each failed request, after we did and without a word of what it is about; `--log kube_client=debug` still can.
    let quieter = format!("kube_client=off,kube_runtime=off,{directives}");
    EnvFilter::try_new(quieter).with_context(|| format!("--log {directives}"))
}

fn lines_of(option: LogFormat, logging: &Logging) -> Lines {
    let ansi = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(ansi);
    match option {
        LogFormat::Text if logging.format.as_deref() != Some("json") => lines.with_target(false).boxed(),
        LogFormat::Text | LogFormat::Json => lines.json().boxed(),
    }
}
