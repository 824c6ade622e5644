//! Programs that change the kernel for us: fed on standard input, listened to on both outputs.

use std::{
    io::{self, Write},
    process::{Command, Output, Stdio},
    thread,
};

use super::DatapathError;

/// Runs a program on lines of input until it ends, whatever it ends with.
pub fn feed(name: &str, args: &[&str], input: &str) -> Result<Output, DatapathError> {
    let child = Command::new(name)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.map_err(|error| failed(name, args, absent(name, &error)))?;
    if let Some(mut stdin) = child.stdin.take() {
        let input = input.as_bytes().to_vec();
        // On a thread of its own: some print while they read, and a full pipe would stop both. A program that ends early
        // says why on its error output.
        thread::spawn(move || drop(stdin.write_all(&input)));
    }
    child.wait_with_output().map_err(|error| failed(name, args, error.to_string()))
}

/// Why a program can't be started, and the way out.
fn absent(name: &str, error: &io::Error) -> String {
    if error.kind() != io::ErrorKind::NotFound {
        return error.to_string();
    }
    let package = match name {
        "ip" => "iproute2",
        "nft" => "nftables",
        name if name.contains("tables") => "iptables",
        name => name,
    };
    format!("no {name} in $PATH: install the package {package}, or run with another --mode")
}

/// The first lines of what a program complained of, or what it ended with.
pub fn complaint(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let first: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).take(3).collect();
    if first.is_empty() { output.status.to_string() } else { first.join("; ") }
}

/// A program could not do what it was started for.
pub fn failed(name: &str, args: &[&str], source: String) -> DatapathError {
    DatapathError::Kernel {
        operation: "run",
        object: [&[name], args].concat().join(" "),
        source: source.into(),
    }
}

/// What a program printed.
pub fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_not_there_names_its_package() {
        let error = feed("ip6tables-nft-not-here", &["-S"], "").expect_err("it is not there");
        let text = format!("{:#}", anyhow::Error::from(error));
        assert_eq!(
            text,
            "run ip6tables-nft-not-here -S: no ip6tables-nft-not-here in $PATH: install the package iptables, or run with another --mode"
        );
    }

    #[test]
    fn programs_read_more_than_a_pipe_holds_while_they_print() {
        let input = "0123456789abcdef\n".repeat(20_000);
        assert_eq!(printed(&feed("cat", &[], &input).expect("cat")), input);
    }

    #[test]
    fn what_went_wrong_is_told_in_a_line() {
        let output =
            feed("sh", &["-c", "echo; echo first >&2; echo >&2; echo second >&2; exit 3"], "").expect("sh");
        assert_eq!(complaint(&output), "first; second");
        assert_eq!(complaint(&feed("sh", &["-c", "exit 3"], "").expect("sh")), "exit status: 3");
    }
}
