//! The data: any JSON, put as a whole, patched, and looked up by path.
//!
//! Invariant: as compact JSON it has no more bytes than its limit.

use serde_json::{Map, Value};

/// What is wrong with a change or a look-up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Firecracker answers 413 to its API's client.
    #[error("the metadata would have {bytes} bytes as JSON, more than the {most} that it may have")]
    TooLarge {
        /// Of the data with the change made.
        bytes: usize,
        /// The limit.
        most: usize,
    },
    /// A patch of nothing.
    #[error("the metadata cannot be patched before it was put")]
    NothingToPatch,
    /// No such path.
    #[error("there is nothing at this path")]
    NotFound,
    /// A number, truth value, list or null, asked for as text.
    #[error("only objects and strings can be given as text; ask for application/json")]
    NotText,
}

/// How a guest is shown a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// As JSON.
    Json,
    /// As EC2's service does: an object as lines of keys, a string as itself.
    Text,
}

/// JSON that the host gives to the guest.
#[derive(Debug)]
pub struct Store {
    value: Option<Value>,
    bytes_max: usize,
}

impl Store {
    /// Empty, for at most `bytes_max` bytes of compact JSON.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self {
            value: None,
            bytes_max,
        }
    }

    /// Everything; null before something was put.
    #[must_use]
    pub fn value(&self) -> &Value {
        self.value.as_ref().unwrap_or(&Value::Null)
    }

    /// Replaces everything.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`]; what was there stays.
    pub fn put(&mut self, value: Value) -> Result<(), StoreError> {
        let bytes = value.to_string().len();
        if bytes > self.bytes_max {
            let most = self.bytes_max;
            return Err(StoreError::TooLarge { bytes, most });
        }
        self.value = Some(value);
        Ok(())
    }

    /// Changes it as RFC 7396 (JSON merge patch) says.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`], [`StoreError::NothingToPatch`]; what was there stays.
    pub fn patch(&mut self, patch: Value) -> Result<(), StoreError> {
        let mut value = self.value.clone().ok_or(StoreError::NothingToPatch)?;
        merge(&mut value, patch);
        self.put(value)
    }

    /// What is at a path of keys between slashes; several slashes are as one, and one at
    /// the end is as none.
    pub(crate) fn at(&self, path: &str, form: Form) -> Result<String, StoreError> {
        let keys = path.split('/').filter(|key| !key.is_empty());
        let pointer: String = keys.flat_map(|key| ["/", key]).collect();
        let found = self.value.as_ref().and_then(|all| all.pointer(&pointer));
        let found = found.ok_or(StoreError::NotFound)?;
        match (form, found) {
            (Form::Json, any) => Ok(any.to_string()),
            (Form::Text, Value::Object(map)) => Ok(keys_of(map)),
            (Form::Text, Value::String(text)) => Ok(text.clone()),
            (Form::Text, Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_)) => {
                Err(StoreError::NotText)
            }
        }
    }
}

/// One line a key; those of objects end in a slash.
fn keys_of(map: &Map<String, Value>) -> String {
    let lines = map.iter().map(|(key, value)| {
        let slash = if value.is_object() { "/" } else { "" };
        format!("{key}{slash}")
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// RFC 7396 §2, its pseudocode: nulls remove, objects merge, all else replaces. As deep
/// as the patch, which serde_json reads to a depth of 128.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    if let Value::Object(target) = target {
        for (key, value) in patch {
            if value.is_null() {
                target.remove(&key);
            } else {
                merge(target.entry(key).or_insert(Value::Null), value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn store() -> Store {
        let mut store = Store::new(51_200);
        let value = json!({
            "age": 43,
            "name": {"first": "John", "second": "Doe"},
            "phones": {"home": {"RO": "+40"}, "mobile": "+44"},
            "tags": ["a", "b"],
        });
        store.put(value).unwrap();
        store
    }

    #[test]
    fn the_appendix_of_rfc_7396_is_followed() {
        for (target, patch, wanted) in [
            (json!({"a":"b"}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"b"}), json!({"b":"c"}), json!({"a":"b","b":"c"})),
            (json!({"a":"b"}), json!({"a":null}), json!({})),
            (
                json!({"a":"b","b":"c"}),
                json!({"a":null}),
                json!({"b":"c"}),
            ),
            (json!({"a":["b"]}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"c"}), json!({"a":["b"]}), json!({"a":["b"]})),
            (
                json!({"a":{"b":"c"}}),
                json!({"a":{"b":"d","c":null}}),
                json!({"a":{"b":"d"}}),
            ),
            (json!({"a":[{"b":"c"}]}), json!({"a":[1]}), json!({"a":[1]})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a":"b"}), json!(["c"]), json!(["c"])),
            (json!({"a":"foo"}), json!(null), json!(null)),
            (json!({"a":"foo"}), json!("bar"), json!("bar")),
            (json!({"e":null}), json!({"a":1}), json!({"e":null,"a":1})),
            (json!([1, 2]), json!({"a":"b","c":null}), json!({"a":"b"})),
            (
                json!({}),
                json!({"a":{"bb":{"ccc":null}}}),
                json!({"a":{"bb":{}}}),
            ),
        ] {
            let mut store = Store::new(100);
            store.put(target).unwrap();
            store.patch(patch.clone()).unwrap();
            assert_eq!(store.value(), &wanted, "{patch}");
        }
    }

    #[test]
    fn a_change_that_does_not_fit_changes_nothing() {
        let mut store = Store::new(9);
        assert_eq!(
            store.patch(json!({"a": 1})),
            Err(StoreError::NothingToPatch)
        );
        store.put(json!({"a": 1})).unwrap();
        let too_large = Err(StoreError::TooLarge { bytes: 13, most: 9 });
        assert_eq!(store.patch(json!({"b": 2})), too_large);
        assert_eq!(
            store.put(json!("123456789")),
            Err(StoreError::TooLarge { bytes: 11, most: 9 })
        );
        store.patch(json!({"a": 123})).unwrap();
        assert_eq!(store.value(), &json!({"a": 123}));
    }

    #[test]
    fn before_anything_was_put_there_is_null_and_nothing_to_find() {
        let store = Store::new(1);
        assert_eq!(store.value(), &Value::Null);
        assert_eq!(store.at("/", Form::Json), Err(StoreError::NotFound));
    }

    #[test]
    fn a_path_leads_to_a_value_in_either_form() {
        let store = store();
        for (path, json, text) in [
            (
                "/name",
                r#"{"first":"John","second":"Doe"}"#,
                "first\nsecond",
            ),
            (
                "/name/",
                r#"{"first":"John","second":"Doe"}"#,
                "first\nsecond",
            ),
            ("//phones///home/RO/", "\"+40\"", "+40"),
            (
                "/phones",
                r#"{"home":{"RO":"+40"},"mobile":"+44"}"#,
                "home/\nmobile",
            ),
        ] {
            assert_eq!(store.at(path, Form::Json).unwrap(), json, "{path}");
            assert_eq!(store.at(path, Form::Text).unwrap(), text, "{path}");
        }
        assert_eq!(
            store.at("/", Form::Text).unwrap(),
            "age\nname/\nphones/\ntags"
        );
        assert_eq!(store.at("/tags/1", Form::Text).unwrap(), "b");
        assert_eq!(store.at("/age", Form::Json).unwrap(), "43");
        for path in ["/age", "/tags"] {
            assert_eq!(store.at(path, Form::Text), Err(StoreError::NotText));
        }
        for path in ["/nam", "/name/first/x", "/tags/2", "/tags/-1", "/ name"] {
            assert_eq!(
                store.at(path, Form::Json),
                Err(StoreError::NotFound),
                "{path}"
            );
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "[a-c~/]{0,3}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-c]", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_patch_applied_twice_is_as_once_and_within_the_limit(
            value in any_json(), patch in any_json(), most in 0_usize..200
        ) {
            let mut store = Store::new(most);
            if store.put(value).is_ok() && store.patch(patch.clone()).is_ok() {
                let once = store.value().clone();
                prop_assert!(once.to_string().len() <= most);
                store.patch(patch).unwrap();
                prop_assert_eq!(store.value(), &once);
            }
            prop_assert!(store.value.is_none() || store.value().to_string().len() <= most);
        }

        #[test]
        fn any_path_is_found_or_not(value in any_json(), path in "[a-c~/01.]{0,12}") {
            let mut store = Store::new(4096);
            if store.put(value).is_ok() && let Ok(found) = store.at(&path, Form::Json) {
                prop_assert!(store.value().to_string().contains(&found));
            }
        }
    }
}
