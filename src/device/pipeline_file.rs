//! A driver's compiled pipelines on disk, so that the next process need not compile them: natively on Vulkan, where the adapter has
//! wgpu's `PIPELINE_CACHE`.
//!
//! One file an adapter, in a folder that the user names:
//!
//! ```text
//! magic "RMPIPES\n"   8 bytes
//! version             4 bytes, little-endian, as all numbers
//! checksum            4 bytes, CRC-32 of everything behind it
//! owner's length      8 bytes
//! data's length       8 bytes
//! owner               UTF-8: the adapter and its driver
//! data                what wgpu gave
//! ```
//!
//! A file that is not exactly that is not used: wgpu looks at its own header alone, and drivers trust what is behind it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::device::Gpu;
use crate::device::notice::notice;
use crate::error::{Error, Result};
use crate::file;

const MAGIC: [u8; 8] = *b"RMPIPES\n";
const VERSION: u32 = 1;
/// Bytes in front of the owner.
const HEADER: usize = 32;
/// Bytes in front of what the checksum covers.
const UNCHECKED: usize = 16;

/// The contents of a file.
fn sealed(owner: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + owner.len() + data.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend((owner.len() as u64).to_le_bytes());
    bytes.extend((data.len() as u64).to_le_bytes());
    bytes.extend(owner.as_bytes());
    bytes.extend(data);
    let checksum = crc32fast::hash(&bytes[UNCHECKED..]);
    bytes[UNCHECKED - 4..UNCHECKED].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// What a file holds for this owner, or why it cannot be used.
fn opened<'a>(bytes: &'a [u8], owner: &str) -> Result<&'a [u8], String> {
    fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
        bytes.get(at..at + N)?.try_into().ok()
    }
    if number(bytes, 0) != Some(MAGIC) {
        return Err("it is no file of compiled pipelines".to_owned());
    }
    let (Some(version), Some(checksum), Some(owner_length), Some(data_length)) = (
        number(bytes, 8).map(u32::from_le_bytes),
        number(bytes, 12).map(u32::from_le_bytes),
        number(bytes, 16).map(u64::from_le_bytes),
        number(bytes, 24).map(u64::from_le_bytes),
    ) else {
        return Err(format!("it has {} bytes, its header {HEADER}", bytes.len()));
    };
    if version != VERSION {
        return Err(format!("it is of version {version}, not {VERSION}"));
    }
    let content = &bytes[HEADER..];
    if owner_length.checked_add(data_length) != Some(content.len() as u64) {
        return Err(format!(
            "it has {} bytes behind its header, which says {owner_length} and {data_length}",
            content.len()
        ));
    }
    if crc32fast::hash(&bytes[UNCHECKED..]) != checksum {
        return Err("its checksum is wrong".to_owned());
    }
    let (found, data) = content.split_at(owner_length as usize);
    if found != owner.as_bytes() {
        let found = String::from_utf8_lossy(found);
        return Err(format!("it belongs to {found}, not to {owner}"));
    }
    Ok(data)
}

/// The compiled pipelines of a device, and the file that they are kept in.
#[derive(Debug)]
pub(crate) struct PipelineFile {
    cache: wgpu::PipelineCache,
    path: PathBuf,
    owner: String,
    /// The checksum of what the file holds, if it can be used.
    kept: Mutex<Option<u32>>,
}

impl PipelineFile {
    /// The file of a device's adapter in a folder. `None` where drivers give no compiled pipelines out: in browsers, and on everything
    /// but Vulkan.
    pub(crate) fn open(gpu: &Gpu, folder: &Path) -> Result<Option<Self>> {
        if !gpu
            .device
            .features()
            .contains(wgpu::Features::PIPELINE_CACHE)
        {
            return Ok(None);
        }
        let Some(key) = wgpu::util::pipeline_cache_key(&gpu.device.adapter_info()) else {
            return Ok(None);
        };
        // The trusted kernels and the checked ones of a process need not share a file, but nothing is wrong if they do.
        let owner = format!("{key} {} {}", gpu.summary.name, gpu.summary.driver);
        let path = folder.join(key);
        let bytes = match fs::read(&path) {
            Ok(bytes) => Some(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                unused(&path, &error.to_string());
                None
            }
        };
        let data = bytes
            .as_deref()
            .and_then(|bytes| match opened(bytes, &owner) {
                Ok(data) => Some(data),
                Err(reason) => {
                    unused(&path, &reason);
                    None
                }
            });
        let cache = gpu.scoped("the compiled pipelines", 0, || {
            compiled_before(&gpu.device, data)
        })?;
        Ok(Some(Self {
            cache,
            path,
            owner,
            kept: Mutex::new(data.map(crc32fast::hash)),
        }))
    }

    pub(crate) fn cache(&self) -> &wgpu::PipelineCache {
        &self.cache
    }

    /// Writes the file if the driver has more to keep than it holds; whether it was written.
    pub(crate) fn save(&self) -> Result<bool> {
        let Some(data) = self.cache.get_data() else {
            return Ok(false);
        };
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let checksum = crc32fast::hash(&data);
        if *kept == Some(checksum) {
            return Ok(false);
        }
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).map_err(|source| Error::File {
            path: folder.to_owned(),
            source,
        })?;
        file::replace(&self.path, &sealed(&self.owner, &data))?;
        *kept = Some(checksum);
        Ok(true)
    }
}

impl Drop for PipelineFile {
    fn drop(&mut self) {
        if let Err(error) = self.save() {
            notice(format_args!("compiled pipelines are not kept: {error}"));
        }
    }
}

fn unused(path: &Path, reason: &str) {
    notice(format_args!(
        "{} is not used, pipelines are compiled anew: {reason}",
        path.display()
    ));
}

/// A device's cache of pipelines, with what an earlier process left.
#[expect(
    unsafe_code,
    reason = "wgpu marks data that a driver will trust as unsafe"
)]
fn compiled_before(device: &wgpu::Device, data: Option<&[u8]>) -> wgpu::PipelineCache {
    let descriptor = wgpu::PipelineCacheDescriptor {
        label: Some("rankmix"),
        data,
        // What the driver does not want, such as that of its own earlier version, is no error.
        fallback: true,
    };
    // SAFETY: `data` must be what `PipelineCache::get_data` returned for an adapter of the same key; a driver takes it for machine
    // code and may not look at it. `data` is `None`, or comes out of a file by `opened` alone, which gives it out only if the file starts with
    // our magic and version, is exactly as long as it says, has the CRC-32 of all that follows, and names the key, the name and the driver of this adapter.
    // `save` writes such files, from `get_data` alone, whole or not at all. So a file that was cut short, damaged, written by another
    // program or another version of this format, or made on another adapter or driver does not get here. wgpu then compares the identity that the driver itself
    // gives its caches, and the size of a pointer. What is left is a file made on purpose to pass for one of ours: its author can write to
    // the folder that the user named for this, which is to be as safe from others as the program itself (`DeviceOptions` says so).
    unsafe { device.create_pipeline_cache(&descriptor) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: &str = "an adapter and its driver";

    #[test]
    fn a_file_gives_back_what_was_sealed() {
        for data in [&b""[..], b"machine code", &[7; 10_000]] {
            let bytes = sealed(OWNER, data);
            assert_eq!(opened(&bytes, OWNER), Ok(data));
        }
    }

    #[test]
    fn a_file_cut_short_anywhere_is_refused() {
        let bytes = sealed(OWNER, b"machine code");
        for length in 0..bytes.len() {
            assert!(opened(&bytes[..length], OWNER).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_file_with_any_bit_flipped_is_refused() {
        let bytes = sealed(OWNER, b"machine code");
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(opened(&damaged, OWNER).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_file_of_others_is_refused_and_says_whose_it_is() {
        let refused = |bytes: &[u8]| opened(bytes, OWNER).expect_err("it is not ours");
        let mut longer = sealed(OWNER, b"machine code");
        longer.push(0);
        assert!(refused(&longer).contains("behind its header"));
        assert!(refused(&sealed("another driver", b"code")).contains("another driver"));
        assert!(refused(b"WGPUPLCH and so on, more than a header's worth").contains("no file"));
        // A version that is to come: its checksum is right, only the number is another.
        let mut newer = sealed(OWNER, b"machine code");
        newer[8..12].copy_from_slice(&2_u32.to_le_bytes());
        assert!(refused(&newer).contains("version 2"));
        // Lengths whose sum would wrap around.
        let mut huge = sealed(OWNER, b"machine code");
        huge[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(refused(&huge).contains("behind its header"));
    }
}
