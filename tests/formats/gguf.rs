use std::fs;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use rankmix::formats::{GgufFile, GgufLora, GgufType, GgufValue, GgufWriter, TensorFile};
use rankmix::{Error, Result, Tensor};

fn floats(shape: &[usize]) -> Tensor {
    let count = shape.iter().product();
    let data = (0..count).map(|i| (i as f32 * 0.618_034).fract() - 0.5);
    Tensor::f32(shape, data.collect()).expect("as many numbers as the shape has elements")
}

/// Every kind of value that metadata can have.
fn values() -> Vec<(&'static str, GgufValue)> {
    let text = |text: &str| GgufValue::Text(text.to_owned());
    vec![
        ("general.architecture", text("llama")),
        ("a.u8", GgufValue::U8(255)),
        ("a.i8", GgufValue::I8(-128)),
        ("a.u16", GgufValue::U16(65_535)),
        ("a.i16", GgufValue::I16(-32_768)),
        ("a.u32", GgufValue::U32(u32::MAX)),
        ("a.i32", GgufValue::I32(i32::MIN)),
        ("a.u64", GgufValue::U64(u64::MAX)),
        ("a.i64", GgufValue::I64(i64::MIN)),
        ("a.f32", GgufValue::F32(-0.1)),
        ("a.f64", GgufValue::F64(0.1)),
        ("a.bool", GgufValue::Bool(true)),
        ("a.text", text("grüße, 世界")),
        ("a.empty", GgufValue::Array(5, Vec::new())),
        (
            "a.tokens",
            GgufValue::texts(["<s>", "", "a b"].map(str::to_owned)),
        ),
        (
            "a.nested",
            GgufValue::Array(
                9,
                vec![
                    GgufValue::Array(0, vec![GgufValue::U8(1)]),
                    GgufValue::Array(0, Vec::new()),
                ],
            ),
        ),
    ]
}

fn written(writer: &GgufWriter<'_>) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("a folder of its own");
    let path = folder.path().join("model.gguf");
    writer
        .write(&path)
        .expect("a folder that can be written to");
    let left = fs::read_dir(&folder).expect("the folder").count();
    assert_eq!(left, 1, "a temporary file was left");
    fs::read(path).expect("the file just written")
}

fn parsed(bytes: &[u8]) -> Result<GgufFile> {
    GgufFile::parse(bytes.to_vec(), "model.gguf")
}

#[test]
fn what_is_written_is_read_back_bit_for_bit() {
    let tensors = [
        ("scalar", floats(&[]), GgufType::F32),
        ("vector", floats(&[7]), GgufType::F32),
        ("matrix", floats(&[3, 5]), GgufType::F32),
        ("four", floats(&[2, 1, 3, 4]), GgufType::F32),
        ("half", floats(&[3, 5]), GgufType::F16),
        ("brain", floats(&[3, 5]), GgufType::Bf16),
    ];
    let mut writer = GgufWriter::new();
    for (key, value) in values() {
        writer.value(key, value).expect("a key of its own");
    }
    for (name, tensor, ty) in &tensors {
        writer.tensor(name, tensor, *ty).expect("a name of its own");
    }
    let bytes = written(&writer);
    let file = parsed(&bytes).expect("the file just written");
    let metadata: Vec<_> = file
        .metadata()
        .iter()
        .map(|(key, value)| (key.as_str(), value.clone()))
        .collect();
    assert_eq!(metadata, values());
    for ((name, tensor, ty), (found, info)) in tensors.iter().zip(file.tensors()) {
        assert_eq!(
            (name, tensor.shape().dims(), ty),
            (&found.as_str(), info.shape.as_slice(), &info.ty)
        );
        assert!(info.offset.is_multiple_of(32), "{name} is not aligned");
        let read = file.tensor(name).expect("a tensor that was listed");
        let (expected, got) = (tensor.to_f32(), read.to_f32());
        let exact = expected.iter().map(|&x| match ty {
            GgufType::F16 => half::f16::from_f32(x).to_f32(),
            GgufType::Bf16 => half::bf16::from_f32(x).to_f32(),
            _ => x,
        });
        assert_eq!(exact.collect::<Vec<_>>(), got, "{name}");
    }
    // The file as it lies on the disk: dimensions innermost first.
    let at = bytes
        .windows(6)
        .position(|window| window == b"matrix")
        .expect("the name")
        + 6;
    let numbers = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    assert_eq!([numbers(at + 4), numbers(at + 12)], [5, 3]);
    let copy = GgufWriter::copy(&file).expect("types that are read");
    assert!(written(&copy) == bytes, "a copy differs from the file");
}

#[test]
fn another_alignment_is_kept_to() {
    let tensors = [floats(&[3]), floats(&[5])];
    let mut writer = GgufWriter::new();
    writer
        .value("general.alignment", GgufValue::U32(256))
        .expect("a power of two");
    writer
        .tensor("a", &tensors[0], GgufType::F32)
        .expect("a name of its own");
    writer
        .tensor("b", &tensors[1], GgufType::F32)
        .expect("a name of its own");
    let file = parsed(&written(&writer)).expect("the file just written");
    for ((name, info), tensor) in file.tensors().iter().zip(&tensors) {
        assert!(info.offset.is_multiple_of(256));
        assert_eq!(
            &file.tensor(name).expect("a tensor that was listed"),
            tensor
        );
    }
}

#[test]
fn adapters_are_read_as_they_were_written() {
    let pairs = vec![
        GgufLora {
            weight: "blk.0.attn_q.weight".to_owned(),
            a: floats(&[4, 12]),
            b: floats(&[6, 4]),
        },
        GgufLora {
            weight: "blk.0.ffn_up.weight".to_owned(),
            a: floats(&[2, 12]),
            b: floats(&[20, 2]),
        },
    ];
    let writer = GgufWriter::lora("llama", 8.0, &pairs, GgufType::F32).expect("names of their own");
    let file = parsed(&written(&writer)).expect("the file just written");
    assert_eq!(
        file.value("general.type").and_then(GgufValue::as_text),
        Some("adapter")
    );
    assert_eq!(file.lora().expect("an adapter"), (8.0, pairs.clone()));

    let mut odd = pairs;
    odd[1].b = floats(&[20, 3]);
    let writer = GgufWriter::lora("llama", 8.0, &odd, GgufType::F16).expect("names of their own");
    let file = parsed(&written(&writer)).expect("the file just written");
    assert_damaged!(file.lora(), "ffn_up", "[2, 12]", "[20, 3]");

    let mut writer = GgufWriter::new();
    let text = |text: &str| GgufValue::Text(text.to_owned());
    writer
        .value("general.type", text("adapter"))
        .expect("a key of its own");
    let lonely = floats(&[2, 3]);
    writer
        .tensor("w.lora_a", &lonely, GgufType::F32)
        .expect("a name of its own");
    let file = parsed(&written(&writer)).expect("the file just written");
    assert_damaged!(file.lora(), "adapter.lora.alpha");
    writer
        .value("adapter.lora.alpha", GgufValue::F32(1.0))
        .expect("a key of its own");
    let file = parsed(&written(&writer)).expect("the file just written");
    assert_damaged!(file.lora(), "w.lora_a", "w.lora_b");
    let file = parsed(&written(&GgufWriter::new())).expect("an empty file is one");
    assert_damaged!(file.lora(), "general.type");
}

#[test]
fn mistakes_of_a_writer_are_refused() {
    let (matrix, five) = (floats(&[3, 5]), floats(&[1, 1, 1, 1, 2]));
    let whole = Tensor::i32([2], vec![1, 2]).expect("two numbers");
    let mut writer = GgufWriter::new();
    writer
        .tensor("a", &matrix, GgufType::F32)
        .expect("a name of its own");
    let refused = writer.tensor("a", &matrix, GgufType::F32);
    assert!(
        matches!(refused, Err(Error::DuplicateName { .. })),
        "{refused:?}"
    );
    for (name, tensor, ty, word) in [
        ("b", &matrix, GgufType::Q4_0, "Q4_0"),
        ("b", &five, GgufType::F32, "at most 4"),
    ] {
        let error = writer
            .tensor(name, tensor, ty)
            .expect_err("this must be refused");
        assert!(
            matches!(error, Error::Setting { .. }) && error.to_string().contains(word),
            "{error}"
        );
    }
    let refused = writer.tensor("b", &whole, GgufType::F32);
    assert!(
        matches!(refused, Err(Error::TypeMismatch { .. })),
        "{refused:?}"
    );
    let mixed = GgufValue::Array(0, vec![GgufValue::U8(1), GgufValue::I8(1)]);
    for (key, value) in [("mixed", mixed), ("general.alignment", GgufValue::U32(24))] {
        let refused = writer.value(key, value);
        assert!(matches!(refused, Err(Error::Setting { .. })), "{refused:?}");
    }
}

/// Builds files byte by byte.
#[derive(Clone, Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn header(tensors: u64, values: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(3).u64(tensors).u64(values)
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn text(self, text: &str) -> Self {
        let mut bytes = self.u64(text.len() as u64);
        bytes.0.extend(text.as_bytes());
        bytes
    }

    fn tensor(self, name: &str, extents: &[u64], ty: u32, offset: u64) -> Self {
        let bytes = self.text(name).u32(extents.len() as u32);
        let bytes = extents
            .iter()
            .fold(bytes, |bytes, &extent| bytes.u64(extent));
        bytes.u32(ty).u64(offset)
    }

    fn data(mut self, count: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32) + count, 0);
        self
    }

    fn parsed(&self) -> Result<GgufFile> {
        parsed(&self.0)
    }
}

#[test]
fn lying_headers_are_refused_with_the_place() {
    let huge = u64::MAX / 2;
    assert_damaged!(parsed(b"GGML\x03\x00\x00\x00"), "GGML", "byte 0");
    assert_damaged!(parsed(b"GG"), "truncated");
    assert_damaged!(Bytes(b"GGUF".to_vec()).u32(9).parsed(), "version 9");
    assert_damaged!(
        Bytes::header(huge, 0).parsed(),
        "number of tensors",
        "9223372036854775807"
    );
    assert_damaged!(Bytes::header(0, huge).parsed(), "number of metadata values");
    // A value of each length that lies.
    let room = [0; 64];
    let with_room = |mut bytes: Bytes| {
        bytes.0.extend(room);
        bytes
    };
    assert_damaged!(
        with_room(Bytes::header(0, 1).u64(huge)).parsed(),
        "metadata key",
        "byte 32"
    );
    let value = |kind: u32| Bytes::header(0, 1).text("the.key").u32(kind);
    assert_damaged!(with_room(value(8).u64(huge)).parsed(), "the.key", "length");
    assert_damaged!(
        with_room(value(9).u32(4).u64(huge)).parsed(),
        "the.key",
        "room for 16"
    );
    assert_damaged!(
        with_room(value(9).u32(77)).parsed(),
        "the.key",
        "unknown kind 77"
    );
    assert_damaged!(with_room(value(13)).parsed(), "the.key", "unknown kind 13");
    assert_damaged!(
        with_room(value(7).u32(2)).parsed(),
        "the.key",
        "truth value 2"
    );
    let mut nested = value(9);
    for _ in 0..100 {
        nested = nested.u32(9).u64(1);
    }
    assert_damaged!(with_room(nested).parsed(), "the.key", "8 arrays");
    let mut latin = Bytes::header(0, 1).u64(1);
    latin.0.push(0xe9);
    assert_damaged!(with_room(latin).parsed(), "UTF-8");
    let twice = Bytes::header(0, 2)
        .text("k")
        .u32(4)
        .u32(1)
        .text("k")
        .u32(4)
        .u32(1);
    assert_damaged!(twice.parsed(), "`k` is there twice");
    let aligned = |to: u32| Bytes::header(0, 1).text("general.alignment").u32(4).u32(to);
    assert_damaged!(aligned(24).parsed(), "general.alignment", "power of two");
    assert_damaged!(aligned(0).parsed(), "general.alignment");
}

#[test]
fn lying_tensors_are_refused_by_name() {
    let one = |extents: &[u64], ty: u32, offset: u64| {
        Bytes::header(1, 0)
            .tensor("the.weight", extents, ty, offset)
            .data(64)
    };
    assert!(one(&[4, 4], 0, 0).parsed().is_ok(), "the sound one of them");
    assert_damaged!(
        one(&[4, 5], 0, 0).parsed(),
        "the.weight",
        "80 bytes",
        "ends at byte"
    );
    assert_damaged!(one(&[4, 4], 0, 32).parsed(), "the.weight", "offset 32");
    assert_damaged!(one(&[4], 0, 8).parsed(), "the.weight", "multiple of 32");
    assert_damaged!(
        one(&[4], 0, u64::MAX - 31).parsed(),
        "the.weight",
        "ends at byte"
    );
    assert_damaged!(
        one(&[1 << 32, 1 << 32], 0, 0).parsed(),
        "the.weight",
        "4294967296"
    );
    assert_damaged!(
        one(&[1 << 62], 0, 0).parsed(),
        "the.weight",
        "cannot be counted"
    );
    assert_damaged!(one(&[1; 5], 0, 0).parsed(), "the.weight", "5 dimensions");
    assert_damaged!(one(&[33], 2, 0).parsed(), "the.weight", "blocks of 32");
    let two = |offset: u64| {
        let bytes = Bytes::header(2, 0).tensor("one", &[16], 0, 0);
        bytes.tensor("other", &[8], 0, offset).data(96)
    };
    assert!(two(64).parsed().is_ok(), "the sound one of them");
    assert_damaged!(two(32).parsed(), "`one`", "`other`", "overlap");
    let twice = Bytes::header(2, 0)
        .tensor("w", &[1], 0, 0)
        .tensor("w", &[1], 0, 32)
        .data(64);
    assert_damaged!(twice.parsed(), "`w` is there twice");
    // Types that are not read are listed, and refused when they are asked for.
    let file = one(&[256], 14, 0).parsed().expect("a known header");
    assert_eq!(file.tensors()[0].1.ty, GgufType::Other(14));
    assert_damaged!(file.tensor("the.weight"), "the.weight", "type 14");
    let missing = file.tensor("no such");
    assert!(
        matches!(missing, Err(Error::UnknownName { .. })),
        "{missing:?}"
    );
}

fn small_file() -> Vec<u8> {
    let tensors = [floats(&[3, 5]), floats(&[2])];
    let mut writer = GgufWriter::new();
    for (key, value) in values() {
        writer.value(key, value).expect("a key of its own");
    }
    writer
        .tensor("one", &tensors[0], GgufType::F32)
        .expect("a name of its own");
    writer
        .tensor("two", &tensors[1], GgufType::F16)
        .expect("a name of its own");
    written(&writer)
}

#[test]
fn every_truncation_is_refused() {
    let whole = small_file();
    // The padding behind the last tensor may be missing: some writers leave it out.
    let needed = whole.len() - 28;
    let mut within_tensors = 0;
    for cut in 0..needed {
        let error = parsed(&whole[..cut]).expect_err("this must be refused");
        let message = error.to_string();
        assert!(matches!(error, Error::Format { .. }), "{error:?}");
        // In the header something ends too early, or there is no room for as many as it says; behind it a tensor.
        let of_tensor = message.contains(&format!("the file ends at byte {cut}"));
        let of_header = ["the file is truncated", "room for"];
        let of_header = of_header.iter().any(|word| message.contains(word));
        assert!(of_tensor || of_header, "{cut}: {message}");
        within_tensors += usize::from(of_tensor);
    }
    assert!(
        within_tensors > 32,
        "{within_tensors} of them in the tensors"
    );
    assert!(parsed(&whole[..needed]).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(422), ..ProptestConfig::default() })]

    /// Whatever is changed: an error or other numbers, no panic, and nothing outside the file is read.
    #[test]
    fn changed_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = small_file();
        for (position, value) in changes {
            let position = position.index(bytes.len());
            bytes[position] = value;
        }
        if let Ok(file) = parsed(&bytes) {
            for (name, _) in file.tensors() {
                _ = file.tensor(name);
            }
            _ = file.lora();
        }
    }
}

/// A file of Python's gguf package, against the elements that the package itself finds in it: see scripts/check_formats.sh.
#[test]
#[ignore = "needs the files of scripts/check_formats.sh"]
fn theirs_are_read_as_they_read_them() {
    let folder = std::env::var("RANKMIX_THEIR_FILES").expect("set by scripts/check_formats.sh");
    let folder = std::path::Path::new(&folder);
    let file = GgufFile::open(folder.join("all.gguf")).expect("a file of theirs");
    let text = file.value("general.name").and_then(GgufValue::as_text);
    assert_eq!(text, Some("grüße"));
    let texts = file.value("some.texts").and_then(GgufValue::as_array);
    assert_eq!(texts.expect("an array")[2].as_text(), Some("世界"));
    let expected = TensorFile::read(folder.join("expected.safetensors")).expect("a file of theirs");
    assert_eq!(expected.metadata["made by"], "safetensors");
    assert_eq!(expected.tensors.len(), 6);
    for (name, tensor) in expected.tensors {
        let found = file
            .tensor(&name)
            .expect("the tensors of both files are the same");
        assert_eq!(found, tensor, "{name}");
    }
}
