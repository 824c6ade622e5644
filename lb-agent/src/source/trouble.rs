//! Why an API server gives us nothing, and what to do about it.

use std::error::Error;

/// What is in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It no longer knows the version we saw last: list again.
    Forgotten,
    /// It has no such kind.
    Missing,
    /// We may not list and watch this kind.
    Forbidden,
    /// It doesn't know us.
    Stranger,
    /// We don't trust its certificate.
    Untrusted,
    /// It is overloaded or broken, but answers.
    Failing,
    /// It can't be reached, or gives no answer.
    Away,
}

impl Trouble {
    /// What a request or a watch failed of.
    pub fn of(error: &kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::of_code(status.code),
            kube::Error::SerdeError(_) => Self::Failing,
            error if reason(error).contains("peer certificate") => Self::Untrusted,
            _ => Self::Away,
        }
    }

    fn of_code(code: u16) -> Self {
        match code {
            401 => Self::Stranger,
            403 => Self::Forbidden,
            404 => Self::Missing,
            410 => Self::Forgotten,
            _ => Self::Failing,
        }
    }

    /// For the log: what it means, and the way out.
    pub const fn advice(self) -> &'static str {
        match self {
            Self::Forgotten => {
                "the API server no longer knows the version seen last; everything is listed again"
            }
            Self::Missing => "the API server has no such kind; the kernel keeps its state",
            Self::Forbidden => {
                "the ClusterRole lacks list and watch of them (deploy/rbac.yaml has them); the kernel keeps its state"
            }
            Self::Stranger => {
                "the API server doesn't know us: give a kubeconfig with a valid token or client certificate, or renew \
                 the service account's token; the kernel keeps its state"
            }
            Self::Untrusted => {
                "the API server's certificate is not trusted: is it the right server, and is certificate-authority in \
                 the kubeconfig the one that signed for it? The kernel keeps its state"
            }
            Self::Failing => "the API server fails; asking again, the kernel keeps its state",
            Self::Away => "the API server is away; the kernel keeps its state",
        }
    }
}

/// An error with its causes, each said once.
pub fn reason(error: &(dyn Error + 'static)) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        next = error.source();
        let mut text = error.to_string();
        if let Some(kube::Error::Api(status)) = error.downcast_ref() {
            text = format!("{} {}: {}", status.code, status.reason, status.message);
            next = None;
        }
        // Most say their cause as well.
        let own = next.and_then(|cause| text.strip_suffix(&cause.to_string())).unwrap_or(&text);
        let own = own.trim_end_matches(": ");
        if !parts.iter().any(|part| part.contains(own)) {
            parts.push(own.to_owned());
        }
    }
    parts.join(": ")
}

#[cfg(test)]
mod tests {
    use std::io;

    use kube::core::Status;

    use super::*;

    fn refused(code: u16) -> kube::Error {
        let status = Status { code, reason: "Because".into(), message: "no".into(), ..Status::default() };
        kube::Error::Api(Box::new(status))
    }

    #[test]
    fn refusals_are_told_apart() {
        for (code, trouble) in [
            (401, Trouble::Stranger),
            (403, Trouble::Forbidden),
            (404, Trouble::Missing),
            (410, Trouble::Forgotten),
            (429, Trouble::Failing),
            (500, Trouble::Failing),
        ] {
            assert_eq!(Trouble::of(&refused(code)), trouble, "{code}");
        }
        let broken = kube::Error::Service(Box::new(io::Error::other("connection reset")));
        assert_eq!(Trouble::of(&broken), Trouble::Away);
        let tls = kube::Error::Service(Box::new(io::Error::other("invalid peer certificate: UnknownIssuer")));
        assert_eq!(Trouble::of(&tls), Trouble::Untrusted);
    }

    #[test]
    fn causes_are_said_once() {
        assert_eq!(reason(&refused(401)), "401 Because: no");
        let broken = kube::Error::Service(Box::new(io::Error::other("connection reset")));
        let text = reason(&broken);
        assert_eq!(text.matches("connection reset").count(), 1, "{text}");
    }
}
