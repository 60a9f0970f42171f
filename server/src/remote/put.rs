//! Puts objects: where none is, and segments as they are.

use std::fs::File;
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{GetOptions, MultipartUpload, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

use super::RemoteError;
use super::store::Store;

/// A segment up to this size is one request, and of a larger one each part.
const PART_BYTES: u64 = 8 << 20;
/// What a body is handed on in: the pace is kept between such pieces.
const PIECE_BYTES: u64 = 128 << 10;

/// Puts an object where none is. False when one is.
pub(super) async fn create(store: &Store, path: &Path, payload: PutPayload) -> Result<bool, RemoteError> {
    let options = PutOptions::from(PutMode::Create);
    match store.objects.put_opts(path, payload, options).await {
        Ok(_) => Ok(true),
        Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => Ok(false),
        Err(source) => Err(RemoteError::Object { name: path.to_string(), source }),
    }
}

/// Puts the bytes. The name has their checksum: an object of that name and size has just these.
pub(super) async fn segment(store: &Store, path: &Path, file: &File, bytes: u64) -> Result<(), RemoteError> {
    let failed = |source| RemoteError::Object { name: path.to_string(), source };
    if bytes <= PART_BYTES {
        let payload = read(store, file, 0, bytes).await?;
        create(store, path, payload).await?;
    } else {
        let mut upload = store.objects.put_multipart(path).await.map_err(failed)?;
        if let Err(error) = put_parts(store, upload.as_mut(), path, file, bytes).await {
            // Best effort: buckets have rules for uploads that were never completed.
            let _ = upload.abort().await;
            return Err(error);
        }
    }
    let there = store.objects.get_opts(path, GetOptions::new().with_head(true)).await.map_err(failed)?;
    match there.meta.size {
        size if size == bytes => Ok(()),
        size => {
            // A half object, of a store that takes such: the next attempt puts it again.
            let _ = store.objects.delete(path).await;
            let problem = format!("it has {size} bytes of {bytes}");
            Err(RemoteError::Damaged { name: path.to_string(), problem })
        }
    }
}

async fn put_parts(
    store: &Store,
    upload: &mut dyn MultipartUpload,
    path: &Path,
    file: &File,
    bytes: u64,
) -> Result<(), RemoteError> {
    let failed = |source| RemoteError::Object { name: path.to_string(), source };
    let mut at = 0;
    while at < bytes {
        let length = (bytes - at).min(PART_BYTES);
        let payload = read(store, file, at, length).await?;
        upload.put_part(payload).await.map_err(failed)?;
        at += length;
    }
    upload.complete().await.map_err(failed)?;
    Ok(())
}

/// Reads a part of a segment.
async fn read(store: &Store, file: &File, from: u64, length: u64) -> Result<PutPayload, RemoteError> {
    let mut pieces: Vec<Bytes> = Vec::new();
    let mut at = from;
    while at < from + length {
        let mut piece = vec![0; (from + length - at).min(PIECE_BYTES) as usize];
        if store.is_folder() {
            store.pace.wait(piece.len() as u64).await;
        }
        let read = file.read_exact_at(&mut piece, at);
        read.map_err(|source| RemoteError::Local { path: "the segment".into(), source })?;
        at += piece.len() as u64;
        pieces.push(piece.into());
    }
    Ok(PutPayload::from_iter(pieces))
}
