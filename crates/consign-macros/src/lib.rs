//! `#[derive(Event)]`, re-exported and explained by the `consign` crate.

use proc_macro::TokenStream;
use quote::quote;
use syn::{DeriveInput, LitInt, LitStr, parse_macro_input};

/// Implements `consign::Event` from `#[event(type = "orders.created", version = 1)]`.
///
/// `type` is `<domain>.<event>` in lower case; `version` counts from 1. A mistake is a compile error at its place.
#[proc_macro_derive(Event, attributes(event))]
pub fn derive_event(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    expand(&input).unwrap_or_else(|e| e.to_compile_error()).into()
}

fn expand(input: &DeriveInput) -> syn::Result<proc_macro2::TokenStream> {
    let mut ty: Option<LitStr> = None;
    let mut version: Option<LitInt> = None;
    for attr in input.attrs.iter().filter(|a| a.path().is_ident("event")) {
        attr.parse_nested_meta(|meta| {
            if meta.path.is_ident("type") {
                ty = Some(meta.value()?.parse()?);
            } else if meta.path.is_ident("version") {
                version = Some(meta.value()?.parse()?);
            } else {
                return Err(meta.error("expected `type` or `version`"));
            }
            Ok(())
        })?;
    }
    let missing = |what: &str| {
        syn::Error::new_spanned(
            &input.ident,
            format!("an event needs {what}: #[event(type = \"orders.created\", version = 1)]"),
        )
    };
    let ty = ty.ok_or_else(|| missing("a type"))?;
    let version = version.ok_or_else(|| missing("a version"))?;
    if !is_event_type(&ty.value()) {
        return Err(syn::Error::new(
            ty.span(),
            "an event's type is `<domain>.<event>`: two words of a-z, 0-9 and _",
        ));
    }
    if version.base10_parse::<u32>()? == 0 {
        return Err(syn::Error::new(version.span(), "versions count from 1"));
    }
    let name = &input.ident;
    let (impl_generics, ty_generics, where_clause) = input.generics.split_for_impl();
    Ok(quote! {
        impl #impl_generics ::consign::Event for #name #ty_generics #where_clause {
            const TYPE: &'static str = #ty;
            const VERSION: u32 = #version;
        }
    })
}

fn is_event_type(ty: &str) -> bool {
    let word = |w: &str| {
        !w.is_empty() && w.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    };
    ty.split('.').count() == 2 && ty.split('.').all(word)
}
