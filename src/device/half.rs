//! Kernels on 16-bit storage: the text of a shader rewritten so that chosen bindings hold 16-bit floats.
//!
//! A kernel is written once, on arrays of f32. Where a value is stored in 16 bits, the array's element type is replaced, every
//! read goes through a function that widens to f32, every write through one that rounds; all arithmetic stays f32. Two
//! forms: `Native` uses WGSL's f16 (`shader-f16`), `Packed` keeps two halves in a u32 and works on every adapter. The memory is the
//! same in both. In the packed form an array of single floats cannot be written: two invocations would share a word.
//!
//! What the rewriting relies on: a float binding is declared on one line, touched only as `name[index]`, and written only by
//! statements `name[index] = value;` or with `+=`, `-=`, `*=`, `/=`. What does not fit is an error, not a wrong kernel.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::device::Shader;
use crate::error::{Error, Result};

/// How a kernel gets at 16-bit floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum HalfForm {
    /// Arrays of f16.
    Native,
    /// Arrays of u32 that hold two each.
    Packed,
}

/// The element type of a float binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    Scalar,
    Vec2,
    Vec4,
}

impl Element {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "f32" => Some(Self::Scalar),
            "vec2<f32>" => Some(Self::Vec2),
            "vec4<f32>" => Some(Self::Vec4),
            _ => None,
        }
    }

    fn wide(self) -> &'static str {
        match self {
            Self::Scalar => "f32",
            Self::Vec2 => "vec2<f32>",
            Self::Vec4 => "vec4<f32>",
        }
    }
}

/// A float storage binding as a shader declares it.
#[derive(Clone, Copy, Debug)]
struct Declared<'a> {
    number: u32,
    name: &'a str,
    element: Element,
    writable: bool,
}

fn declaration(line: &str) -> Option<Declared<'_>> {
    let rest = line.trim_start().strip_prefix("@group(0) @binding(")?;
    let (number, rest) = rest.split_once(") var<storage, ")?;
    let (access, rest) = rest.split_once("> ")?;
    let (name, rest) = rest.split_once(": array<")?;
    let element = Element::parse(rest.split_once(">;")?.0)?;
    Some(Declared {
        number: number.parse().ok()?,
        name,
        element,
        writable: access == "read_write",
    })
}

/// Whether the shader declares the binding of that number on one line as a read-only array of integers: what stands in for a float buffer
/// that a kernel does not read.
pub(crate) fn is_integers(shader: Shader, number: u32) -> bool {
    let start = format!("@group(0) @binding({number}) var<storage, read> ");
    shader.source.lines().any(|line| {
        let declared = line.trim_start().strip_prefix(&start);
        let array = declared.and_then(|rest| rest.split_once(": array<"));
        array.is_some_and(|(_, rest)| rest.starts_with("u32>;") || rest.starts_with("i32>;"))
    })
}

/// The element type of a float binding, if the shader declares one of that number.
pub(crate) fn element_of(shader: Shader, number: u32) -> Option<Element> {
    let declared = shader.source.lines().filter_map(declaration);
    declared
        .filter(|declared| declared.number == number)
        .map(|declared| declared.element)
        .next()
}

/// The shader with the bindings of these numbers stored in 16 bits.
///
/// # Errors
/// [`Error::Gpu`] if its text cannot be rewritten.
pub(crate) fn with_halves(shader: Shader, numbers: &[u32], form: HalfForm) -> Result<Shader> {
    type Key = (Shader, Vec<u32>, HalfForm);
    static MADE: OnceLock<Mutex<HashMap<Key, Shader>>> = OnceLock::new();
    let mut numbers = numbers.to_vec();
    numbers.sort_unstable();
    numbers.dedup();
    let key = (shader, numbers, form);
    let mut made = MADE
        .get_or_init(Mutex::default)
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if let Some(&known) = made.get(&key) {
        return Ok(known);
    }
    let source = rewrite(shader, &key.1, form)?;
    let list: Vec<String> = key.1.iter().map(u32::to_string).collect();
    // Kept for the life of the process: there are as many as kernels times sets of bindings, and each is made once.
    let variant = Shader {
        name: Box::leak(format!("{} (f16: {})", shader.name, list.join(" ")).into_boxed_str()),
        source: Box::leak(source.into_boxed_str()),
    };
    made.insert(key, variant);
    Ok(variant)
}

fn rewrite(shader: Shader, numbers: &[u32], form: HalfForm) -> Result<String> {
    let wrong = |reason: String| Error::Gpu {
        thing: format!("16-bit storage in the shader `{}`", shader.name),
        reason,
    };
    let declared: Vec<Declared<'_>> = shader
        .source
        .lines()
        .filter_map(declaration)
        .filter(|declared| numbers.contains(&declared.number))
        .collect();
    if let Some(missing) = numbers
        .iter()
        .find(|&&number| !declared.iter().any(|declared| declared.number == number))
    {
        return Err(wrong(format!(
            "binding {missing} is not declared on one line as an array of f32, vec2<f32> or vec4<f32>"
        )));
    }
    let mut text = String::with_capacity(shader.source.len() + 1024);
    if form == HalfForm::Native {
        text.push_str("enable f16;\n");
    }
    for line in shader.source.lines() {
        match declaration(line).filter(|found| numbers.contains(&found.number)) {
            Some(found) => text.push_str(&line.replacen(
                &format!("array<{}>", found.element.wide()),
                &format!("array<{}>", stored(found.element, form)),
                1,
            )),
            // Comments are dropped: they speak of the arrays too.
            None => {
                let code = line.split("//").next().unwrap_or(line);
                text.push_str(&expression(code, &declared).map_err(wrong)?);
            }
        }
        text.push('\n');
    }
    for one in &declared {
        if one.writable && form == HalfForm::Packed && one.element == Element::Scalar {
            return Err(wrong(format!(
                "`{}` is written float by float: two of them share a word",
                one.name
            )));
        }
        text.push_str(&functions(*one, form));
    }
    if declared.iter().any(|one| one.writable) {
        text.push_str(match form {
            HalfForm::Native => NARROW_NATIVE,
            HalfForm::Packed => NARROW_PACKED,
        });
    }
    Ok(text)
}

fn stored(element: Element, form: HalfForm) -> &'static str {
    match (form, element) {
        (HalfForm::Native, Element::Scalar) => "f16",
        (HalfForm::Native, Element::Vec2) => "vec2<f16>",
        (HalfForm::Native, Element::Vec4) => "vec4<f16>",
        (HalfForm::Packed, Element::Scalar | Element::Vec2) => "u32",
        (HalfForm::Packed, Element::Vec4) => "vec2<u32>",
    }
}

const NARROW_NATIVE: &str = include_str!("../../shaders/parts/narrow_native.wgsl");
const NARROW_PACKED: &str = include_str!("../../shaders/parts/narrow_packed.wgsl");

fn functions(one: Declared<'_>, form: HalfForm) -> String {
    let Declared {
        name,
        element,
        writable,
        ..
    } = one;
    let wide = element.wide();
    // Names that no binding has: a parameter would hide it.
    let read = match (form, element) {
        (HalfForm::Native, _) => format!("{wide}({name}[half_index])"),
        (HalfForm::Packed, Element::Scalar) => {
            format!("unpack2x16float({name}[half_index >> 1u] >> ((half_index & 1u) * 16u)).x")
        }
        (HalfForm::Packed, Element::Vec2) => format!("unpack2x16float({name}[half_index])"),
        (HalfForm::Packed, Element::Vec4) => {
            format!(
                "vec4(unpack2x16float({name}[half_index].x), unpack2x16float({name}[half_index].y))"
            )
        }
    };
    let mut text =
        format!("\nfn half_load_{name}(half_index: u32) -> {wide} {{ return {read}; }}\n");
    // A component that is chosen at run time is chosen in memory. Microsoft's FXC picks one of a vector by multiplying the others with
    // zero: beside an infinity, or what lies past an array's end, that makes a NaN.
    let component = match (form, element) {
        (_, Element::Scalar) => None,
        (HalfForm::Native, _) => Some(format!("f32({name}[half_index][half_which])")),
        (HalfForm::Packed, Element::Vec2) => Some(format!(
            "unpack2x16float({name}[half_index] >> ((half_which & 1u) * 16u)).x"
        )),
        (HalfForm::Packed, Element::Vec4) => Some(format!(
            "unpack2x16float({name}[half_index][half_which >> 1u] >> ((half_which & 1u) * 16u)).x"
        )),
    };
    if let Some(component) = component {
        text.push_str(&format!(
            "fn half_component_{name}(half_index: u32, half_which: u32) -> f32 {{ return {component}; }}\n"
        ));
    }
    if writable {
        let narrow = match (form, element) {
            (HalfForm::Native, Element::Vec2) => {
                "vec2(half_narrow(half_value.x), half_narrow(half_value.y))"
            }
            (HalfForm::Native, Element::Vec4) => {
                "vec4(half_narrow(half_value.x), half_narrow(half_value.y), half_narrow(half_value.z), half_narrow(half_value.w))"
            }
            (HalfForm::Packed, Element::Vec4) => {
                "vec2(half_narrow(half_value.xy), half_narrow(half_value.zw))"
            }
            // One f16, or the two that share a word.
            (HalfForm::Native, Element::Scalar) | (HalfForm::Packed, _) => {
                "half_narrow(half_value)"
            }
        };
        text.push_str(&format!(
            "fn half_store_{name}(half_index: u32, half_value: {wide}) {{ {name}[half_index] = {narrow}; }}\n"
        ));
    }
    text
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// The text with reads and writes of the declared arrays as calls.
fn expression(text: &str, declared: &[Declared<'_>]) -> Result<String, String> {
    let bytes = text.as_bytes();
    let mut out = String::with_capacity(text.len() + 32);
    let mut at = 0;
    while at < bytes.len() {
        let starts_word = is_word(bytes[at]) && (at == 0 || !is_word(bytes[at - 1]));
        if !starts_word {
            let next = text[at..].chars().next().map_or(1, char::len_utf8);
            out.push_str(&text[at..at + next]);
            at += next;
            continue;
        }
        let end = at
            + bytes[at..]
                .iter()
                .take_while(|&&byte| is_word(byte))
                .count();
        let word = &text[at..end];
        let is_field = at > 0 && bytes[at - 1] == b'.';
        let array = declared
            .iter()
            .find(|one| one.name == word && !is_field && bytes.get(end) == Some(&b'['));
        let Some(array) = array else {
            // An array of unknown length can be indexed, or pointed to: other uses of the word mean something else.
            let before = text[..at].trim_end();
            let pointed_to = before.ends_with('&') && !before.ends_with("&&");
            if pointed_to && declared.iter().any(|one| one.name == word) {
                return Err(format!("`{word}` is pointed to: {text}"));
            }
            out.push_str(word);
            at = end;
            continue;
        };
        let close = closing(text, end).ok_or_else(|| format!("an index spans lines: {text}"))?;
        let index = expression(&text[end + 1..close], declared)?;
        let rest = &text[close + 1..];
        let load = format!("half_load_{word}({index})");
        match assignment(rest)? {
            None if array.element != Element::Scalar && rest.starts_with('[') => {
                let end = closing(rest, 0)
                    .ok_or_else(|| format!("the index of a component spans lines: {text}"))?;
                let component = expression(&rest[1..end], declared)?;
                out.push_str(&format!("half_component_{word}({index}, {component})"));
                at = close + 1 + end + 1;
            }
            None => {
                out.push_str(&load);
                at = close + 1;
            }
            Some((operator, value_at)) => {
                if !array.writable {
                    return Err(format!("`{word}` is written but declared read-only"));
                }
                let value = &rest[value_at..];
                let length = value
                    .find(';')
                    .ok_or_else(|| format!("a write to `{word}` spans lines: {text}"))?;
                let value = expression(value[..length].trim(), declared)?;
                let value = match operator {
                    Some(operator) => format!("{load} {operator} ({value})"),
                    None => value,
                };
                out.push_str(&format!("half_store_{word}({index}, {value})"));
                at = close + 1 + value_at + length;
            }
        }
    }
    Ok(out)
}

/// Where the bracket that opens at `open` closes.
fn closing(text: &str, open: usize) -> Option<usize> {
    let mut depth = 0;
    for (at, byte) in text.bytes().enumerate().skip(open) {
        match byte {
            b'[' => depth += 1,
            b']' => {
                depth -= 1;
                if depth == 0 {
                    return Some(at);
                }
            }
            _ => {}
        }
    }
    None
}

/// Whether what follows `name[index]` assigns to it: the operator in front of `=`, and where the value starts.
fn assignment(rest: &str) -> Result<Option<(Option<char>, usize)>, String> {
    let trimmed = rest.trim_start();
    let skipped = rest.len() - trimmed.len();
    let mut chars = trimmed.chars();
    match (chars.next(), chars.next()) {
        (Some('='), second) if second != Some('=') => Ok(Some((None, skipped + 1))),
        (Some(operator @ ('+' | '-' | '*' | '/')), Some('=')) => {
            Ok(Some((Some(operator), skipped + 2)))
        }
        (Some('+'), Some('+')) | (Some('-'), Some('-')) => {
            Err(format!("`++` and `--` on a float array: {rest}"))
        }
        (Some('.' | '['), _) => {
            // A component may be read, but not written on its own.
            let target = trimmed.split(['=', ';', ',', ')', '+', '*']).next();
            let after = target.map_or("", |target| &trimmed[target.len()..]);
            let compared = after.starts_with("==")
                || target.is_some_and(|target| target.ends_with(['<', '>', '!']));
            let written = after.starts_with('=') && !compared;
            if written {
                Err(format!("a component is written on its own: {rest}"))
            } else {
                Ok(None)
            }
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHADER: Shader = Shader {
        name: "test",
        source: "@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>; // four
@group(0) @binding(2) var<storage, read> order: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(1) fn forward(@builtin(global_invocation_id) id: vec3<u32>) {
  let q = id.x; // x[q] stays here
  let v = x[order[q] >> 2u][order[q] & 3u] + x[q].x;
  if (y[q] == 1.0) { y[q] += v * x[u32(y[0])].w; } else { y[q + 1u] = v; }
}
",
    };

    #[test]
    fn reads_and_writes_become_calls() {
        let native = with_halves(SHADER, &[1, 3], HalfForm::Native).expect("it can be rewritten");
        for expected in [
            "enable f16;",
            "var<storage, read> x: array<vec4<f16>>;",
            "var<storage, read_write> y: array<f16>;",
            "let v = half_component_x(order[q] >> 2u, order[q] & 3u) + half_load_x(q).x;",
            "if (half_load_y(q) == 1.0) { half_store_y(q, half_load_y(q) + (v * half_load_x(u32(half_load_y(0))).w)); }",
            "half_store_y(q + 1u, v);",
        ] {
            assert!(
                native.source.contains(expected),
                "{expected}\nis not in\n{}",
                native.source
            );
        }
        let packed = with_halves(SHADER, &[1], HalfForm::Packed).expect("it can be rewritten");
        assert!(packed.source.contains("x: array<vec2<u32>>;"));
        assert!(packed.source.contains("y: array<f32>;"));
        assert!(packed.source.contains("y[q + 1u] = v;"));
    }

    #[test]
    fn what_cannot_be_rewritten_is_an_error() {
        let refused = |source: &'static str, numbers: &[u32], form| {
            with_halves(
                Shader {
                    name: "refused",
                    source,
                },
                numbers,
                form,
            )
            .expect_err("it cannot be rewritten")
            .to_string()
        };
        assert!(refused(SHADER.source, &[2], HalfForm::Native).contains("binding 2"));
        assert!(refused(SHADER.source, &[3], HalfForm::Packed).contains("share a word"));
        let length = "@group(0) @binding(1) var<storage, read> x: array<f32>;\nfn f() -> u32 { return arrayLength(&x); }\n";
        assert!(refused(length, &[1], HalfForm::Packed).contains("pointed"));
        let component = "@group(0) @binding(1) var<storage, read_write> x: array<vec4<f32>>;\nfn f() { x[0].y = 1.0; }\n";
        assert!(refused(component, &[1], HalfForm::Native).contains("component"));
    }
}
