// Shows the OpenAPI document of the service that this page comes from.
window.addEventListener('load', () => {
  const place = document.getElementById('reference')
  window.ui = SwaggerUIBundle({
    url: place.dataset.document,
    domNode: place,
    deepLinking: true,
    displayRequestDuration: true,
    validatorUrl: null, // the default sends the document to a server of others
  })
})
