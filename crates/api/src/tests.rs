//! Routes by hand, and that routes and document are the same.

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::routes::ROUTES;
use crate::{Action, Call, Method, OPENAPI, RequestError, Stage, parse};

fn ask(method: Method, path: &str, body: Option<&Value>) -> Result<Call, RequestError> {
    let body = body.map(Value::to_string);
    parse(method, path, body.as_ref().map(String::as_bytes)).1
}

fn refusal(method: Method, path: &str, body: Option<&Value>) -> String {
    ask(method, path, body).unwrap_err().to_string()
}

#[test]
fn paths_are_found_with_and_without_a_slash_at_the_end() {
    for path in ["/", "", "//", "/?a=b"] {
        let got = ask(Method::Get, path, None);
        assert_eq!(got.is_ok(), path != "//", "{path}");
    }
    assert!(ask(Method::Get, "/vm/config/", None).is_ok());
    for path in ["/vm", "/vm/config/x", "/Version", "/drives"] {
        let got = ask(Method::Get, path, None);
        assert!(
            matches!(got, Err(RequestError::NoSuchPath { .. })),
            "{path}"
        );
    }
}

#[test]
fn bodies_are_where_they_must_be_and_nowhere_else() {
    assert_eq!(
        refusal(Method::Get, "/", Some(&json!({}))),
        "GET / takes no body"
    );
    assert_eq!(
        refusal(Method::Put, "/entropy", None),
        "PUT /entropy needs a body"
    );
    assert_eq!(
        refusal(Method::Patch, "/vm", None),
        "PATCH /vm needs a body"
    );
    let got = refusal(Method::Delete, "/drives/a", Some(&json!({})));
    assert_eq!(got, "DELETE /drives/a takes no body");
    assert!(ask(Method::Patch, "/balloon/hinting/start", None).is_ok());
}

#[test]
fn names_of_devices_are_checked_and_the_same_in_path_and_body() {
    let body = json!({"drive_id": "a", "is_root_device": false, "path_on_host": "/d"});
    assert!(ask(Method::Put, "/drives/a", Some(&body)).is_ok());
    assert_eq!(
        refusal(Method::Put, "/drives/b", Some(&body)),
        r#"the path names "b", the body "a": they must be the same"#
    );
    for path in ["/drives", "/drives/"] {
        let got = ask(Method::Put, path, Some(&body));
        assert!(matches!(got, Err(RequestError::NoId { .. })), "{path}");
    }
    let got = ask(Method::Put, "/drives/a-b", Some(&body));
    assert!(matches!(got, Err(RequestError::Id { .. })));
}

#[test]
fn an_empty_change_and_half_a_configuration_are_refused() {
    let got = refusal(Method::Patch, "/machine-config", Some(&json!({})));
    assert!(got.contains("changes nothing"), "{got}");
    let got = refusal(
        Method::Put,
        "/machine-config",
        Some(&json!({"vcpu_count": 1})),
    );
    assert!(got.contains("missing field `mem_size_mib`"), "{got}");
}

#[test]
fn a_snapshot_has_one_memory() {
    let load = |body| ask(Method::Put, "/snapshot/load", Some(&body));
    let file = json!({"snapshot_path": "/s", "mem_file_path": "/m"});
    assert!(load(file.clone()).unwrap().deprecated.is_some());
    let backend = json!({"backend_type": "File", "backend_path": "/m"});
    let new = json!({"snapshot_path": "/s", "mem_backend": backend});
    let Action::LoadSnapshot(body) = load(new).unwrap().action else {
        panic!("another action");
    };
    assert_eq!(body.memory().unwrap().backend_path.to_str(), Some("/m"));
    assert!(load(json!({"snapshot_path": "/s"})).is_err());
    let mut both = file;
    both["mem_backend"] = backend;
    assert!(load(both).is_err());
}

#[test]
fn stages_are_firecrackers() {
    let stage = |method, path, body: Value| ask(method, path, Some(&body)).unwrap().action.stage();
    let vm = json!({"state": "Paused"});
    assert_eq!(stage(Method::Patch, "/vm", vm), Stage::AfterStart);
    assert_eq!(stage(Method::Put, "/mmds", json!({})), Stage::Both);
    assert_eq!(
        stage(Method::Put, "/entropy", json!({})),
        Stage::BeforeStart
    );
}

/// The document's operations: method, path, and the schema of the body.
fn documented() -> Vec<(Method, String, Option<Value>)> {
    let document: Value = serde_json::from_str(OPENAPI).unwrap();
    let mut list = Vec::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            let method = Method::parse(&method.to_uppercase()).unwrap();
            let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
            let schema = (!schema.is_null()).then(|| resolve(&document, schema));
            list.push((method, path.clone(), schema));
        }
    }
    list
}

/// `schema` with every reference replaced by what it means.
fn resolve(document: &Value, schema: &Value) -> Value {
    match schema {
        Value::Object(map) => {
            if let Some(reference) = map.get("$ref") {
                let pointer = reference.as_str().unwrap().trim_start_matches('#');
                return resolve(document, document.pointer(pointer).expect(pointer));
            }
            let members = map
                .iter()
                .map(|(name, value)| (name.clone(), resolve(document, value)));
            Value::Object(members.collect())
        }
        Value::Array(list) => list.iter().map(|value| resolve(document, value)).collect(),
        other => other.clone(),
    }
}

/// A value that `schema` allows, with every property that it names.
fn sample(schema: &Value) -> Value {
    if let Some(example) = schema.get("example") {
        return example.clone();
    }
    if let Some(first) = schema.get("enum").and_then(|list| list.get(0)) {
        return first.clone();
    }
    match schema["type"].as_str().expect("a type or an example") {
        "object" => {
            let none = serde_json::Map::new();
            let properties = schema["properties"].as_object().unwrap_or(&none);
            let members = properties
                .iter()
                .map(|(name, value)| (name.clone(), sample(value)));
            Value::Object(members.collect())
        }
        "array" => json!([sample(&schema["items"])]),
        "string" => json!("a"),
        "integer" => schema.get("minimum").cloned().unwrap_or(json!(0)),
        "boolean" => json!(true),
        other => panic!("no sample of {other}"),
    }
}

/// Every property of `schema` and of what is in it, as a pointer into a sample, with
/// whether it is required.
fn properties(schema: &Value, at: &str, list: &mut Vec<(String, bool, Value)>) {
    let required: Vec<_> = schema["required"]
        .as_array()
        .into_iter()
        .flatten()
        .collect();
    for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
        let pointer = format!("{at}/{name}");
        properties(inner, &pointer, list);
        list.push((pointer, required.contains(&&json!(name)), inner.clone()));
    }
}

fn removed(from: &Value, pointer: &str) -> Value {
    let mut value = from.clone();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    value
        .pointer_mut(parent)
        .unwrap()
        .as_object_mut()
        .unwrap()
        .remove(name);
    value
}

fn filled(path: &str) -> String {
    path.split('/')
        .map(|part| if part.starts_with('{') { "a" } else { part })
        .collect::<Vec<_>>()
        .join("/")
}

#[test]
fn document_and_server_have_the_same_operations() {
    let mut documented: Vec<_> = documented()
        .into_iter()
        .map(|(method, path, _)| format!("{} {path}", method.name()))
        .collect();
    let mut served: Vec<_> = ROUTES
        .iter()
        .map(|route| format!("{} {}", route.method.name(), route.path))
        .collect();
    documented.sort();
    served.sort();
    assert_eq!(documented, served);
    let paths: std::collections::BTreeSet<_> = ROUTES.iter().map(|route| route.path).collect();
    assert_eq!(paths.len(), 26, "as many as Firecracker has");
}

/// Bodies whose fields exclude each other.
const ONE_OF: [&str; 2] = ["mem_file_path", "mem_backend"];

#[test]
fn document_and_server_agree_on_every_field() {
    let mut fields = 0;
    for (method, path, schema) in documented() {
        let path = filled(&path);
        let Some(schema) = schema else {
            assert!(ask(method, &path, None).is_ok(), "{method:?} {path}");
            continue;
        };
        let mut body = sample(&schema);
        if ONE_OF.iter().all(|name| body.get(name).is_some()) {
            body = removed(&body, "/mem_file_path");
        }
        let got = ask(method, &path, Some(&body));
        assert!(got.is_ok(), "{method:?} {path} {body}: {got:?}");

        if schema["additionalProperties"] == json!(false) {
            let mut more = body.clone();
            more["frobs"] = json!(1);
            let got = refusal(method, &path, Some(&more));
            assert!(
                got.contains("unknown field `frobs`"),
                "{method:?} {path}: {got}"
            );
        }
        let mut list = Vec::new();
        properties(&schema, "", &mut list);
        for (pointer, required, inner) in list {
            fields += 1;
            if body.pointer(&pointer).is_none() {
                continue;
            }
            let less = removed(&body, &pointer);
            let got = ask(method, &path, Some(&less));
            let one_of = ONE_OF.iter().any(|name| pointer.ends_with(name));
            let last = less.as_object().is_some_and(serde_json::Map::is_empty)
                && path == "/machine-config";
            assert_eq!(
                got.is_ok(),
                !(required || one_of || last),
                "{method:?} {path} without {pointer}: {got:?}"
            );
            for value in inner["enum"].as_array().into_iter().flatten() {
                let mut other = body.clone();
                *other.pointer_mut(&pointer).unwrap() = value.clone();
                let got = ask(method, &path, Some(&other));
                assert!(
                    got.is_ok(),
                    "{method:?} {path} {pointer} = {value}: {got:?}"
                );
            }
            if inner.get("enum").is_some() {
                let mut other = body.clone();
                *other.pointer_mut(&pointer).unwrap() = json!("frobs");
                assert!(
                    ask(method, &path, Some(&other)).is_err(),
                    "{method:?} {path} {pointer}"
                );
            }
        }
    }
    assert!(fields > 100, "the document has only {fields} fields");
}

proptest! {
    #[test]
    fn no_request_makes_it_panic(
        route in 0..ROUTES.len(),
        rest in "(/[a-z0-9_%.é-]{0,9}){0,3}",
        body in prop::option::of(prop_oneof![
            prop::collection::vec(any::<u8>(), 0..60),
            "[\\[{]{0,900}".prop_map(String::into_bytes),
            "\\{(\"(size|drive_id|id|state|action_type|leaf|bitmap)\": ?(1|\"a\"|null|-1|1e999|\\{\\}),? ?){0,4}\\}"
                .prop_map(String::into_bytes),
        ]),
    ) {
        let route = &ROUTES[route];
        for path in [route.path.to_owned(), format!("{}{rest}", filled(route.path)), rest] {
            if let Err(error) = parse(route.method, &path, body.as_deref()).1 {
                prop_assert!(!error.to_string().is_empty());
            }
        }
    }
}
