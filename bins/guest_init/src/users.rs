//! Whom the process runs as: `user[:group]` of an image configuration, looked up as runc does
//! (`libcontainer/user.GetExecUser`).
//!
//! Invariant: lines that are not well-formed are skipped, never fatal; images hold all kinds of them.

use crate::error::InitError;

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// Ids and home of a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

impl Identity {
    /// Looks `wanted` up in the root's files, which may be missing.
    pub(crate) fn find(wanted: &str) -> Result<Self, InitError> {
        Self::find_in(wanted, &read(PASSWD), &read(GROUP))
    }

    fn find_in(wanted: &str, passwd: &[u8], group: &[u8]) -> Result<Self, InitError> {
        let (user, wanted_group) = wanted.split_once(':').unwrap_or((wanted, ""));
        let entry = passwd_entries(passwd).find(|entry| {
            if user.is_empty() {
                entry.uid == 0
            } else {
                entry.name == user.as_bytes() || Some(entry.uid) == id(user.as_bytes())
            }
        });
        let (uid, mut gid, name, home) = match (entry, id(user.as_bytes())) {
            (Some(entry), _) => (
                entry.uid,
                entry.gid,
                entry.name,
                String::from_utf8_lossy(entry.home).into_owned(),
            ),
            (None, Some(uid)) => (uid, 0, &b""[..], String::new()),
            (None, None) if user.is_empty() => (0, 0, &b""[..], String::new()),
            (None, None) => return Err(unknown("user", user, PASSWD)),
        };
        let mut groups = Vec::new();
        if wanted_group.is_empty() {
            if !name.is_empty() {
                groups.extend(
                    group_entries(group)
                        .filter(|entry| entry.has_member(name))
                        .map(|entry| entry.gid),
                );
            }
        } else {
            let number = id(wanted_group.as_bytes());
            let entry = group_entries(group)
                .find(|entry| entry.name == wanted_group.as_bytes() || Some(entry.gid) == number);
            gid = match (entry, number) {
                (Some(entry), _) => entry.gid,
                (None, Some(number)) => number,
                (None, None) => return Err(unknown("group", wanted_group, GROUP)),
            };
        }
        let home = if home.is_empty() {
            String::from("/")
        } else {
            home
        };
        Ok(Self {
            uid,
            gid,
            groups,
            home,
        })
    }
}

fn unknown(what: &'static str, name: &str, file: &'static str) -> InitError {
    InitError::UnknownUser {
        what,
        name: String::from(name),
        file,
    }
}

fn read(path: &str) -> Vec<u8> {
    std::fs::read(path).unwrap_or_default()
}

/// A decimal id, 0 to 2^31 - 1 as runc allows.
fn id(text: &[u8]) -> Option<u32> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = std::str::from_utf8(text).ok()?.parse::<i32>().ok()?;
    u32::try_from(number).ok()
}

struct PasswdEntry<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
}

fn passwd_entries(file: &[u8]) -> impl Iterator<Item = PasswdEntry<'_>> {
    file.split(|&byte| byte == b'\n').filter_map(|line| {
        let mut fields = line.trim_ascii().split(|&byte| byte == b':');
        let name = fields
            .next()
            .filter(|name| !name.is_empty() && !name.starts_with(b"#"))?;
        let _password = fields.next()?;
        let uid = id(fields.next()?)?;
        let gid = id(fields.next()?)?;
        let _gecos = fields.next();
        Some(PasswdEntry {
            name,
            uid,
            gid,
            home: fields.next().unwrap_or_default(),
        })
    })
}

struct GroupEntry<'a> {
    name: &'a [u8],
    gid: u32,
    members: &'a [u8],
}

impl GroupEntry<'_> {
    fn has_member(&self, user: &[u8]) -> bool {
        self.members
            .split(|&byte| byte == b',')
            .any(|member| member.trim_ascii() == user)
    }
}

fn group_entries(file: &[u8]) -> impl Iterator<Item = GroupEntry<'_>> {
    file.split(|&byte| byte == b'\n').filter_map(|line| {
        let mut fields = line.trim_ascii().split(|&byte| byte == b':');
        let name = fields
            .next()
            .filter(|name| !name.is_empty() && !name.starts_with(b"#"))?;
        let _password = fields.next()?;
        let gid = id(fields.next()?)?;
        Some(GroupEntry {
            name,
            gid,
            members: fields.next().unwrap_or_default(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"# comment\nroot:x:0:0:root:/root:/bin/sh\n\nbroken\nweb:x:33:34::/srv/web:/bin/false\n\
        shorthome:x:40:41\nhuge:x:99999999999:1::/:\n1000:x:7:8::/seven:\nada:x:1000:1000:Ada:/home/ada:/bin/sh\n";
    const GROUP: &[u8] =
        b"root:x:0:\nnonsense\nadm:x:4:web, ada\nvideo:x:44:ada\nada:x:1000:\nstaff:x:50\n";

    fn check(wanted: &str, uid: u32, gid: u32, groups: &[u32], home: &str) {
        let found = Identity::find_in(wanted, PASSWD, GROUP).unwrap();
        assert_eq!(
            found,
            Identity {
                uid,
                gid,
                groups: groups.to_vec(),
                home: String::from(home)
            },
            "{wanted:?}"
        );
    }

    #[test]
    fn users_and_groups_are_found_as_runc_finds_them() {
        check("", 0, 0, &[], "/root");
        check("root", 0, 0, &[], "/root");
        check("web", 33, 34, &[4], "/srv/web");
        check("ada", 1000, 1000, &[4, 44], "/home/ada");
        check("33", 33, 34, &[4], "/srv/web");
        check("ada:video", 1000, 44, &[], "/home/ada");
        check("ada:44", 1000, 44, &[], "/home/ada");
        check("ada:777", 1000, 777, &[], "/home/ada");
        check("4242", 4242, 0, &[], "/");
        check("4242:4343", 4242, 4343, &[], "/");
        check(":staff", 0, 50, &[], "/root");
        check("shorthome", 40, 41, &[], "/");
    }

    #[test]
    fn name_of_digits_comes_before_the_number_when_it_stands_first() {
        check("1000", 7, 8, &[], "/seven");
    }

    #[test]
    fn unknown_user_or_group_is_named() {
        for (wanted, part) in [
            ("nobody-here", "user \"nobody-here\""),
            ("ada:none", "group \"none\""),
            ("huge", "huge"),
            ("-1", "-1"),
            ("2147483648", "2147483648"),
        ] {
            let error = Identity::find_in(wanted, PASSWD, GROUP)
                .unwrap_err()
                .to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn root_without_files_has_a_root_user() {
        let found = Identity::find_in("", b"", b"").unwrap();
        assert_eq!(
            found,
            Identity {
                uid: 0,
                gid: 0,
                groups: vec![],
                home: String::from("/")
            }
        );
    }

    #[test]
    fn garbage_files_are_survived() {
        let garbage: Vec<u8> = (0..=255)
            .cycle()
            .take(5000)
            .map(|byte: u8| if byte.is_multiple_of(7) { b':' } else { byte })
            .collect();
        assert!(Identity::find_in("ada", &garbage, &garbage).is_err());
        assert_eq!(Identity::find_in("5:6", &garbage, &garbage).unwrap().gid, 6);
    }
}
