// npm's openai: a chat whole and streamed, a tool call, a JSON schema.
import OpenAI from 'openai'

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: 'unused', maxRetries: 0 })
const user = content => [{ role: 'user', content }]
const tool = {
  type: 'function',
  function: {
    name: 'get_weather',
    description: 'The weather in a city.',
    parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
  },
}
const person = {
  type: 'object',
  properties: { name: { type: 'string' }, age: { type: 'integer' } },
  required: ['name', 'age'],
  additionalProperties: false,
}
const whole = await client.chat.completions.create({ model: 'tiny', messages: user('Hi') })
let streamed = ''
for await (const chunk of client.chat.completions.stream({ model: 'tiny', messages: user('Hi') })) {
  streamed += chunk.choices[0]?.delta.content ?? ''
}
const runner = client.chat.completions.stream({ model: 'tiny', messages: user('What is the weather?'), tools: [tool] })
const called = (await runner.finalChatCompletion()).choices[0].message.tool_calls[0]
const parsed = await client.chat.completions.create({
  model: 'tiny',
  messages: user('Name a person.'),
  response_format: { type: 'json_schema', json_schema: { name: 'person', schema: person, strict: true } },
})
const response = await client.responses.create({ model: 'tiny', input: 'Hi' })
console.log(
  JSON.stringify({
    text: whole.choices[0].message.content,
    streamed,
    tool: [called.function.name, JSON.parse(called.function.arguments)],
    parsed: JSON.parse(parsed.choices[0].message.content),
    response: response.output_text,
  }),
)
