//! What a conversion is of, and in what two of them differ.

use serde_json::{Map, Value};

/// So many differences are told, and of the others their number.
const TOLD: usize = 4;

/// What a conversion is of: equal options and an equal source give an equal folder.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Fingerprint {
    pub(crate) options: Value,
    pub(crate) source: Value,
}

impl Fingerprint {
    /// That in the report of a conversion.
    pub(crate) fn of(report: &Value) -> Option<Self> {
        Some(Self {
            options: report.get("options")?.clone(),
            source: report.get("source")?.clone(),
        })
    }
}

/// What differs between two sets of options, or two sources, in words.
pub(crate) fn differences(old: &Value, new: &Value) -> String {
    let mut found = Vec::new();
    collect("", old, new, &mut found);
    let more = found.len().saturating_sub(TOLD);
    found.truncate(TOLD);
    let mut told = found.join("; ");
    if more > 0 {
        told += &format!("; and {more} more");
    }
    told
}

fn collect(place: &str, old: &Value, new: &Value, found: &mut Vec<String>) {
    if old == new {
        return;
    }
    let parts = |value: &Value| match value {
        Value::Object(object) => Some(object.clone()),
        Value::Array(array) => by_name(array),
        _ => None,
    };
    let (Some(olds), Some(news)) = (parts(old), parts(new)) else {
        found.push(match (old, new) {
            (Value::Null, Value::Object(_)) => format!("{place} is new"),
            (Value::Object(_), Value::Null) => format!("{place} is gone"),
            _ => format!("{place} {old}, now {new}"),
        });
        return;
    };
    let gone = olds.keys().filter(|key| !news.contains_key(*key));
    for key in news.keys().chain(gone) {
        let [old, new] = [&olds, &news].map(|parts| parts.get(key).unwrap_or(&Value::Null));
        let inside = format!("{place} {key}");
        collect(inside.trim_start(), old, new, found);
    }
}

/// The elements of an array by their names, if all have one.
fn by_name(array: &[Value]) -> Option<Map<String, Value>> {
    let named = array.iter().map(|element| {
        let name = element.get("name")?.as_str()?;
        Some((name.to_owned(), element.clone()))
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::differences;

    #[test]
    fn what_differs_is_named() {
        let old = json!({"path": "/a", "files": [{"name": "x", "bytes": 1}, {"name": "y", "bytes": 2}], "c": 1});
        let new = json!({"path": "/b", "files": [{"name": "z", "bytes": 1}, {"name": "y", "bytes": 3}], "c": 1});
        assert_eq!(
            differences(&old, &new),
            "path \"/a\", now \"/b\"; files z is new; files y bytes 2, now 3; files x is gone"
        );
        assert_eq!(differences(&old, &old), "");
        let [old, new] = [1, 2].map(|x| json!([x, x, x]));
        assert_eq!(
            differences(&json!({ "n": old }), &json!({ "n": new })),
            "n [1,1,1], now [2,2,2]"
        );
        let [old, new] = [1, 2].map(|x| json!({"a": x, "b": x, "c": x, "d": x, "e": x, "f": x}));
        assert!(differences(&old, &new).ends_with("d 1, now 2; and 2 more"));
    }
}
