//! Resource limits of the monitor (setrlimit(2)).

use rustix::process::{Resource, Rlimit, setrlimit};

use crate::error::Error;

/// Descriptors unless told, as in Firecracker.
const FILES: u64 = 2048;

/// Limits that the monitor and what it starts can lower but not raise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    file_bytes: Option<u64>,
    files: u64,
}

impl Limits {
    /// From `NAME=VALUE`; of two for the same resource the last one counts.
    ///
    /// # Errors
    /// [`Error::Limit`].
    pub(crate) fn check(asked: &[String]) -> Result<Self, Error> {
        let mut limits = Self {
            file_bytes: None,
            files: FILES,
        };
        for asked in asked {
            let refused = |wanted| Error::Limit {
                asked: asked.clone(),
                wanted,
            };
            let (name, value) = asked
                .split_once('=')
                .ok_or_else(|| refused("of the form NAME=VALUE"))?;
            let value = value
                .parse()
                .map_err(|_| refused("a number of 64 bits behind the ="))?;
            match name {
                "fsize" => limits.file_bytes = Some(value),
                "no-file" => limits.files = value,
                _ => return Err(refused("fsize=BYTES or no-file=N")),
            }
        }
        Ok(limits)
    }

    /// Sets them for this process and what it becomes.
    ///
    /// # Errors
    /// [`Error::SetLimit`], for example where a limit above the present one needs
    /// CAP_SYS_RESOURCE.
    pub(crate) fn set(self) -> Result<(), Error> {
        let set = |name, resource, value| {
            let limit = Rlimit {
                current: Some(value),
                maximum: Some(value),
            };
            setrlimit(resource, limit).map_err(|source| Error::SetLimit {
                name,
                value,
                source: source.into(),
            })
        };
        if let Some(bytes) = self.file_bytes {
            set("fsize", Resource::Fsize, bytes)?;
        }
        set("no-file", Resource::Nofile, self.files)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(asked: &[&str]) -> Result<Limits, Error> {
        Limits::check(
            &asked
                .iter()
                .map(|text| (*text).to_owned())
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn descriptors_are_limited_unless_told() {
        let limits = check(&[]).unwrap();
        assert_eq!((limits.file_bytes, limits.files), (None, 2048));
        let limits = check(&["fsize=1048575", "no-file=3", "no-file=1024"]).unwrap();
        assert_eq!((limits.file_bytes, limits.files), (Some(1_048_575), 1024));
    }

    #[test]
    fn a_limit_of_another_form_name_or_value_is_refused() {
        for asked in [
            "",
            "fsize",
            "fsize=",
            "fsize=-1",
            "no-file=1=2",
            "nofile=1",
            "no-file=x",
        ] {
            let error = check(&[asked]).unwrap_err();
            assert!(matches!(error, Error::Limit { .. }), "{asked}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_limit_or_refused(text in ".{0,24}") {
            if let Ok(limits) = check(&[&text]) {
                let (_, value) = text.split_once('=').unwrap();
                let value = value.parse().unwrap();
                prop_assert!(limits.file_bytes == Some(value) || limits.files == value);
            }
        }
    }
}
