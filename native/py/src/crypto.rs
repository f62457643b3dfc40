//! Ciphers as Python sees them: for tests against other implementations, and for benchmarks. The
//! agents seal nothing themselves.

use ebbtide_core::crypto::sm4::{Cbc, Ctr, Gcm as Sm4Gcm, Kernel, Xts, XtsStandard};
use ebbtide_core::crypto::{CryptoError, Gcm, NONCE_LEN, Suite, TAG_LEN};
use ebbtide_core::server::{ExitCode, Failure};
use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::{bad_request, raise};

/// Name of the SM4 kernel that this process uses.
#[pyfunction]
pub fn sm4_kernel() -> PyResult<&'static str> {
    Ok(Kernel::chosen().map_err(raise)?.name())
}

/// Names of the SM4 kernels that this processor can run, the best first.
#[pyfunction]
pub fn sm4_kernels() -> Vec<&'static str> {
    Kernel::all().into_iter().map(Kernel::name).collect()
}

fn kernel(name: Option<&str>) -> PyResult<Kernel> {
    match name {
        None => Kernel::chosen().map_err(raise),
        Some(name) => Kernel::by_name(name).map_err(|error| bad_request(error.to_string())),
    }
}

fn array<const N: usize>(bytes: &[u8], what: &str) -> PyResult<[u8; N]> {
    let wrong = |_| bad_request(format!("{what} has {N} bytes, not {}", bytes.len()));
    bytes.try_into().map_err(wrong)
}

#[allow(clippy::needless_pass_by_value)] // For `map_err`.
fn raise_crypto(error: CryptoError) -> PyErr {
    match error {
        CryptoError::InvalidTag => raise(Failure::new(
            "damaged",
            ExitCode::Damaged,
            error.to_string(),
            "the text is gone",
        )),
        _ => bad_request(error.to_string()),
    }
}

/// Bytes that ciphers change in place, where Python cannot touch them meanwhile.
#[pyclass(frozen, name = "Text", module = "ebbtide._native")]
#[derive(Debug)]
pub struct PyText(Mutex<Vec<u8>>);

#[pymethods]
impl PyText {
    #[new]
    fn new(data: &[u8]) -> Self {
        Self(Mutex::new(data.to_vec()))
    }

    fn __len__(&self) -> usize {
        self.0.lock().len()
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.lock())
    }
}

#[derive(Debug)]
enum Either {
    Suite(Gcm),
    Sm4(Box<Sm4Gcm>),
}

/// GCM with a key of a suite.
#[pyclass(frozen, name = "Gcm", module = "ebbtide._native")]
#[derive(Debug)]
pub struct PyGcm(Either);

#[pymethods]
impl PyGcm {
    #[new]
    #[pyo3(signature = (suite, key, kernel=None))]
    fn new(suite: u16, key: &[u8], kernel: Option<&str>) -> PyResult<Self> {
        let suite = Suite::try_from(suite).map_err(raise_crypto)?;
        if key.len() != suite.key_len() {
            let expected = suite.key_len();
            return Err(bad_request(format!("the suite's key has {expected} bytes")));
        }
        if suite == Suite::Sm4Gcm {
            let kernel = self::kernel(kernel)?;
            let gcm = Sm4Gcm::new(kernel, &array(key, "a key")?);
            return Ok(Self(Either::Sm4(Box::new(gcm))));
        }
        if kernel.is_some() {
            return Err(bad_request("only SM4 has kernels"));
        }
        Ok(Self(Either::Suite(Gcm::new(suite, key))))
    }

    /// Encrypts `text` in place; returns its tag.
    fn seal<'py>(
        &self,
        py: Python<'py>,
        nonce: &[u8],
        aad: &[u8],
        text: &PyText,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let nonce: [u8; NONCE_LEN] = array(nonce, "a nonce")?;
        let tag = py.detach(|| {
            let text = &mut text.0.lock();
            match &self.0 {
                Either::Sm4(gcm) => gcm.seal(&nonce, aad, text),
                Either::Suite(gcm) => gcm.seal(nonce, aad, text),
            }
        });
        Ok(PyBytes::new(py, &tag))
    }

    /// Decrypts `text` in place.
    fn open(
        &self,
        py: Python<'_>,
        nonce: &[u8],
        aad: &[u8],
        text: &PyText,
        tag: &[u8],
    ) -> PyResult<()> {
        let nonce: [u8; NONCE_LEN] = array(nonce, "a nonce")?;
        let tag: [u8; TAG_LEN] = array(tag, "a tag")?;
        py.detach(|| {
            let text = &mut text.0.lock();
            match &self.0 {
                Either::Sm4(gcm) => gcm.open(&nonce, aad, text, &tag),
                Either::Suite(gcm) => gcm.open(nonce, aad, text, &tag),
            }
        })
        .map_err(raise_crypto)
    }
}

/// SM4-CTR, a stream.
#[pyclass(frozen, module = "ebbtide._native")]
#[derive(Debug)]
pub struct Sm4Ctr(Mutex<Ctr>);

#[pymethods]
impl Sm4Ctr {
    #[new]
    #[pyo3(signature = (key, counter, kernel=None))]
    fn new(key: &[u8], counter: &[u8], kernel: Option<&str>) -> PyResult<Self> {
        let (key, counter) = (array(key, "a key")?, array(counter, "a counter")?);
        let kernel = self::kernel(kernel)?;
        Ok(Self(Mutex::new(Ctr::new(kernel, &key, &counter))))
    }

    fn apply(&self, py: Python<'_>, text: &PyText) {
        py.detach(|| self.0.lock().apply(&mut text.0.lock()));
    }
}

/// SM4-CBC on whole blocks, a stream.
#[pyclass(frozen, module = "ebbtide._native")]
#[derive(Debug)]
pub struct Sm4Cbc(Mutex<Cbc>);

#[pymethods]
impl Sm4Cbc {
    #[new]
    #[pyo3(signature = (key, iv, kernel=None))]
    fn new(key: &[u8], iv: &[u8], kernel: Option<&str>) -> PyResult<Self> {
        let (key, iv) = (array(key, "a key")?, array(iv, "an initialization vector")?);
        let kernel = self::kernel(kernel)?;
        Ok(Self(Mutex::new(Cbc::new(kernel, &key, &iv))))
    }

    fn encrypt(&self, py: Python<'_>, text: &PyText) -> PyResult<()> {
        py.detach(|| self.0.lock().encrypt(&mut text.0.lock()))
            .map_err(raise_crypto)
    }

    fn decrypt(&self, py: Python<'_>, text: &PyText) -> PyResult<()> {
        py.detach(|| self.0.lock().decrypt(&mut text.0.lock()))
            .map_err(raise_crypto)
    }
}

/// SM4-XTS.
#[pyclass(frozen, module = "ebbtide._native")]
#[derive(Debug)]
pub struct Sm4Xts(Xts);

#[pymethods]
impl Sm4Xts {
    /// `standard` is "gb" or "ieee"; `key` is that of the text, then that of the tweaks.
    #[new]
    #[pyo3(signature = (standard, key, kernel=None))]
    fn new(standard: &str, key: &[u8], kernel: Option<&str>) -> PyResult<Self> {
        let standard = match standard {
            "gb" => XtsStandard::Gb,
            "ieee" => XtsStandard::Ieee,
            _ => return Err(bad_request("the standard is \"gb\" or \"ieee\"")),
        };
        let key: [u8; 32] = array(key, "a pair of keys")?;
        let (text, tweak) = (array(&key[..16], "a key")?, array(&key[16..], "a key")?);
        let kernel = self::kernel(kernel)?;
        Ok(Self(Xts::new(kernel, standard, &text, &tweak)))
    }

    fn encrypt(&self, py: Python<'_>, tweak: &[u8], text: &PyText) -> PyResult<()> {
        let tweak = array(tweak, "a tweak")?;
        py.detach(|| self.0.encrypt(&tweak, &mut text.0.lock()))
            .map_err(raise_crypto)
    }

    fn decrypt(&self, py: Python<'_>, tweak: &[u8], text: &PyText) -> PyResult<()> {
        let tweak = array(tweak, "a tweak")?;
        py.detach(|| self.0.decrypt(&tweak, &mut text.0.lock()))
            .map_err(raise_crypto)
    }

    /// Consecutive units of `unit_len` bytes from unit `first` on.
    fn encrypt_units(
        &self,
        py: Python<'_>,
        first: u64,
        unit_len: usize,
        text: &PyText,
    ) -> PyResult<()> {
        py.detach(|| self.0.encrypt_units(first, unit_len, &mut text.0.lock()))
            .map_err(raise_crypto)
    }

    fn decrypt_units(
        &self,
        py: Python<'_>,
        first: u64,
        unit_len: usize,
        text: &PyText,
    ) -> PyResult<()> {
        py.detach(|| self.0.decrypt_units(first, unit_len, &mut text.0.lock()))
            .map_err(raise_crypto)
    }
}
